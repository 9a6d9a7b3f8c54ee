"""The model while it is trained: the vision tower with its neck, the projector, and SmolLM2's own weights, frozen, with LoRA beside
each fused matrix.

LoRA (Hu et al. 2021, arXiv:2106.09685, eq. 3) lies on the fused matrices (queries, keys and values are one): four a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.vision.efficientnet import EfficientNetLiteTower
from pruning.dynamic.token_merging import choose_tokens, means

WIDTH, LAYERS, HEADS, KV_HEADS, DIM = 576, 30, 9, 3, 64
EPS, THETA = 1e-5, 100_000.0
RANK, ALPHA = 16, 32
FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


class LoraLinear(nn.Module):
    weight: Tensor
    used = True
    """Whether what was trained is added."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.a = nn.Parameter(torch.randn(RANK, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], RANK))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        return y + F.linear(F.linear(x, self.a), self.b) * (ALPHA / RANK) if self.used else y


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
        """x [n, rows, width]; cos, sin [n, 1, rows, dim / 2]; mask [n, 1, rows, rows], added."""
        n, rows, _ = x.shape
        qkv = self.qkv(rms_norm(x, self.norm1)).view(n, rows, HEADS + 2 * KV_HEADS, DIM).transpose(1, 2)
        query, key, value = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        key, value = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (rotate(key, cos, sin), value))
        mixed = F.scaled_dot_product_attention(rotate(query, cos, sin), key, value, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, rows, WIDTH))
        gate, up = self.gate_up(rms_norm(x, self.norm2)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Projector(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, WIDTH)
        self.linear_2 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Visual(NamedTuple):
    """Visual tokens [n, kept, width], their places among all of the picture's [n, kept], and how many each stands for [n, kept]
    (None: itself)."""

    tokens: Tensor
    places: Tensor
    sizes: Tensor | None


class Smol(nn.Module):
    embedding: Tensor
    norm: Tensor
    inv_freq: Tensor

    def __init__(self, weights: Mapping[str, Tensor], tower: EfficientNetLiteTower) -> None:
        """`weights` of the language model by transformers' names."""
        super().__init__()
        self.tower = tower
        self.projector = Projector(tower.config.hidden_size)
        self.layers = nn.ModuleList(Layer(weights, f"model.layers.{i}") for i in range(LAYERS))
        self.register_buffer("embedding", weights["model.embed_tokens.weight"], persistent=False)
        self.register_buffer("norm", weights["model.norm.weight"], persistent=False)
        self.register_buffer("inv_freq", THETA ** (-torch.arange(0, DIM, 2).float() / DIM), persistent=False)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Inside, LoRA is left out: the language model as it was before training."""
        try:
            LoraLinear.used = False
            yield
        finally:
            LoraLinear.used = True

    def visual(self, hidden: Tensor, keep: int) -> Visual:
        """Of the tower's [n, places, hidden], merged into `keep` for each picture where those are fewer."""
        tokens = self.projector(hidden)
        n, places = tokens.shape[:2]
        if keep >= places:
            return Visual(tokens, torch.arange(places, device=tokens.device).expand(n, -1), None)
        with torch.no_grad():
            kept, shares = choose_tokens(tokens, keep)
        return Visual(means(tokens, shares), kept, shares.sum(1))

    def forward(self, ids: Tensor, positions: Tensor, segments: Tensor, visual: Visual | None = None, first: int = 0) -> Tensor:
        """Last hidden states [n, rows, width], normed. `visual` stands from row `first` on, at its own positions.

        A row sees the earlier rows of its segment and of segment 0.
        """
        x = F.embedding(ids, self.embedding)
        if visual:
            rows = slice(first, first + visual.tokens.shape[1])
            x, positions = x.clone(), positions.clone()
            x[:, rows], positions[:, rows] = visual.tokens.to(x.dtype), visual.places + first
        order = torch.arange(ids.shape[1], device=ids.device)
        same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
        mask = torch.where(same & (order[:, None] >= order), 0.0, -1e4).to(x.dtype)[:, None]
        if visual and visual.sizes is not None:
            mask[..., rows] += visual.sizes.log()[:, None, None, :]
        angles = positions[:, None, :, None].float() * self.inv_freq
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return rms_norm(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding).float()
