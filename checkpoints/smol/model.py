"""The model while it is trained: SmolLM2's own weights, frozen, LoRA beside each fused matrix, the neck and the projector.

LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3) lies on the fused matrices (queries, keys and values are one): four a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vision.efficientnet import EfficientNetLiteConfig, Maps, Neck, join, joined_width

WIDTH, LAYERS, HEADS, KV_HEADS, DIM = 576, 30, 9, 3, 64
EPS, THETA = 1e-5, 100_000.0
RANK, ALPHA = 16, 32
NECK_LAYERS = 1
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class LoraLinear(nn.Module):
    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.a = nn.Parameter(torch.randn(RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return F.linear(x, self.weight) + low * (ALPHA / RANK)

    def delta(self) -> Tensor:
        return self.b @ self.a * (ALPHA / RANK)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Layer(nn.Module):
    norm1: Tensor
    norm2: Tensor
    qkv: LoraLinear
    out: LoraLinear
    gate_up: LoraLinear
    down: LoraLinear

    def __init__(self, weights: Mapping[str, Tensor], at: str) -> None:
        super().__init__()
        for name, parts in FUSED.items():
            setattr(self, name, LoraLinear(torch.cat([weights[f"{at}.{part}.weight"] for part in parts])))
        self.register_buffer("norm1", weights[f"{at}.input_layernorm.weight"], persistent=False)
        self.register_buffer("norm2", weights[f"{at}.post_attention_layernorm.weight"], persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """x [n, rows, width]; cos, sin [n, 1, rows, dim / 2]; mask [n, 1, 1, rows, rows], added."""
        n, rows, _ = x.shape
        qkv = self.qkv(rms_norm(x, self.norm1)).view(n, rows, HEADS + 2 * KV_HEADS, DIM).transpose(1, 2)
        query, key, value = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        query = rotate(query, cos, sin).reshape(n, KV_HEADS, HEADS // KV_HEADS, rows, DIM)
        key = rotate(key, cos, sin)[:, :, None]
        scores = query @ key.transpose(-1, -2) * DIM**-0.5 + mask
        mixed = scores.float().softmax(-1).to(x.dtype) @ value[:, :, None]
        x = x + self.out(mixed.reshape(n, HEADS, rows, DIM).transpose(1, 2).reshape(n, rows, WIDTH))
        gate, up = self.gate_up(rms_norm(x, self.norm2)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Projector(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, WIDTH)
        self.linear_2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Smol(nn.Module):
    embedding: Tensor
    norm: Tensor
    head_weight: Tensor
    head_bias: Tensor
    inv_freq: Tensor

    def __init__(self, weights: Mapping[str, Tensor], head: tuple[Tensor, Tensor]) -> None:
        """`weights` of the language model by transformers' names; `head` is the frozen network's last convolution."""
        super().__init__()
        config = EfficientNetLiteConfig(neck_layers=NECK_LAYERS)
        self.neck = Neck(config, joined_width(config))
        self.projector = Projector(config.hidden_size)
        self.layers = nn.ModuleList(Layer(weights, f"model.layers.{i}") for i in range(LAYERS))
        self.register_buffer("embedding", weights["model.embed_tokens.weight"], persistent=False)
        self.register_buffer("norm", weights["model.norm.weight"], persistent=False)
        self.register_buffer("head_weight", head[0].flatten(1).to(torch.bfloat16), persistent=False)
        self.register_buffer("head_bias", head[1].to(torch.bfloat16), persistent=False)
        self.register_buffer("inv_freq", THETA ** (-torch.arange(0, DIM, 2).float() / DIM), persistent=False)

    def look(self, maps: Maps) -> Tensor:
        """What the neck makes of the maps: [n, side², hidden]."""
        with torch.no_grad():
            seen = join(maps, self.head_weight, self.head_bias)
        return self.neck(seen.to(self.embedding.dtype))

    def visual(self, hidden: Tensor, kept: Tensor) -> Tensor:
        """Visual tokens [n, kept, width] of the places `kept` [n, kept]."""
        chosen = hidden.gather(1, kept[:, :, None].expand(-1, -1, hidden.shape[-1]))
        return self.projector(chosen)

    def forward(self, ids: Tensor, positions: Tensor, segments: Tensor, visual: Tensor | None, first: int) -> Tensor:
        """Last hidden states [n, rows, width], normed. `visual` [m, kept, width] stand from row `first` on in the first m."""
        x = F.embedding(ids, self.embedding)
        if visual is not None:
            m, kept, _ = visual.shape
            x = torch.cat([torch.cat([x[:m, :first], visual.to(x.dtype), x[:m, first + kept :]], dim=1), x[m:]])
        rows = ids.shape[1]
        order = torch.arange(rows, device=ids.device)
        same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        mask = torch.where(same & (order[:, None] >= order), 0.0, -1e4).to(x.dtype)[:, None, None]
        angles = positions[:, None, :, None].float() * self.inv_freq
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return rms_norm(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding).float()
