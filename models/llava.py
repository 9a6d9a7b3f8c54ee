"""LLaVA's weights, fused for our own forward. transformers loads them and maps their names; after that its modules are gone."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from models.linear import Linear, take
from models.vision import VisionBlock, VisionTower, feature_layers

TEXT_MODELS = ("llama", "mistral", "qwen2")


class UnsupportedCheckpoint(ValueError):
    """The checkpoint needs something that this forward does not compute; the message names it."""


@dataclass
class Block:
    """One layer of the language model. `qkv` holds queries, keys and values; `gate_up` the gate, then the up projection."""

    input_norm: Tensor
    qkv: Linear
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear

    def linears(self) -> dict[str, Linear]:
        return {"qkv": self.qkv, "out": self.out, "gate_up": self.gate_up, "down": self.down}


@dataclass
class Llava:
    config: LlavaConfig
    vision: VisionTower
    embedding: Tensor  # [vocab, width]
    blocks: list[Block]
    norm: Tensor
    head: Linear
    inv_freq: Tensor  # [head_dim / 2], float32
    rope_scaling: float

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def kv_heads(self) -> int:
        return int(self.config.text_config.num_key_value_heads)

    @property
    def heads(self) -> int:
        return int(self.config.text_config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        text = self.config.text_config
        return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

    @property
    def eps(self) -> float:
        return float(self.config.text_config.rms_norm_eps)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together. A sliding window bounds it: within the window, attention is full."""
        text = self.config.text_config
        return int(min(text.max_position_embeddings, getattr(text, "sliding_window", None) or 1 << 60))

    @property
    def visual_tokens_per_image(self) -> int:
        clip = self.config.vision_config
        full = self.config.vision_feature_select_strategy == "full"
        return int((clip.image_size // clip.patch_size) ** 2) + full

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.embedding)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [rows, 1, head_dim / 2] at `positions` [rows], in the model's dtype."""
        angles = positions[:, None, None].float() * self.inv_freq
        return (angles.cos() * self.rope_scaling).to(self.dtype), (angles.sin() * self.rope_scaling).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [rows, width] to float32 logits [rows, vocab]."""
        return self.head(F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.eps)).float()

    def linears(self) -> dict[str, Linear]:
        """Every matrix by name, `language.3.qkv` and the like."""
        named = {f"language.{i}.{name}": m for i, b in enumerate(self.blocks) for name, m in b.linears().items()}
        for i, b in enumerate(self.vision.blocks):
            named |= {f"vision.{i}.{name}": getattr(b, name) for name in ("qkv", "out", "up", "down")}
        named |= {f"projector.{i}": m for i, m in enumerate(self.vision.projector)}
        return named | {"head": self.head}

    @property
    def weight_bytes(self) -> int:
        embedding = self.embedding.numel() * self.embedding.element_size()
        tied = self.head.weight.data_ptr() == self.embedding.data_ptr()
        return sum(m.bytes for m in self.linears().values()) + (0 if tied else embedding)


def check_supported(config: LlavaConfig) -> None:
    """Raise UnsupportedCheckpoint, naming what is missing, for a configuration that the forward does not compute."""
    text, vision = config.text_config, config.vision_config
    if vision.model_type != "clip_vision_model":
        raise UnsupportedCheckpoint(f"vision tower {vision.model_type!r} is not supported; CLIP towers are")
    if text.model_type not in TEXT_MODELS:
        raise UnsupportedCheckpoint(f"text model {text.model_type!r} is not supported; {', '.join(TEXT_MODELS)} are")
    if text.hidden_act not in ("silu", "swish"):
        raise UnsupportedCheckpoint(f"text activation {text.hidden_act!r} is not supported; silu is")
    rope = text.rope_parameters["rope_type"]
    if rope in ("dynamic", "longrope"):
        raise UnsupportedCheckpoint(f"RoPE type {rope!r} changes with the prompt's length and is not supported")
    if config.vision_feature_select_strategy not in ("default", "full"):
        raise UnsupportedCheckpoint(f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} is not known")
    total = vision.num_hidden_layers + 1
    chosen = config.vision_feature_layer
    for layer in [chosen] if isinstance(chosen, int) else chosen:
        if not -total < layer < total or layer == 0:
            raise UnsupportedCheckpoint(f"vision_feature_layer {layer} names no layer of a tower of {total - 1}")


@torch.no_grad()
def from_transformers(model: LlavaForConditionalGeneration) -> Llava:
    """Take the weights out of a transformers model and leave it empty, so that they are held once."""
    config = model.config
    check_supported(config)
    text = model.model.language_model
    # The vision tower goes first and its unused layers are let go.
    vision = _take_vision(model)
    blocks = []
    for layer in text.layers:
        blocks.append(
            Block(
                input_norm=layer.input_layernorm.weight.detach(),
                qkv=take(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                out=take(layer.self_attn.o_proj),
                post_norm=layer.post_attention_layernorm.weight.detach(),
                gate_up=take(layer.mlp.gate_proj, layer.mlp.up_proj),
                down=take(layer.mlp.down_proj),
            )
        )
        _return_freed_memory()
    return Llava(
        config=config,
        vision=vision,
        embedding=text.embed_tokens.weight.detach(),
        blocks=blocks,
        norm=text.norm.weight.detach(),
        head=take(model.lm_head),
        inv_freq=text.rotary_emb.inv_freq.float(),
        rope_scaling=float(text.rotary_emb.attention_scaling),
    )


def _return_freed_memory() -> None:
    """Give back what the unfused matrices held: glibc keeps freed blocks of up to 32 MB, in sum nearly a second copy."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _take_vision(model: LlavaForConditionalGeneration) -> VisionTower:
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    used = max(feature_layers(model.config))
    blocks = [
        VisionBlock(
            norm1=(layer.layer_norm1.weight.detach(), layer.layer_norm1.bias.detach()),
            qkv=take(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            out=take(layer.self_attn.out_proj),
            norm2=(layer.layer_norm2.weight.detach(), layer.layer_norm2.bias.detach()),
            up=take(layer.mlp.fc1),
            down=take(layer.mlp.fc2),
        )
        for layer in tower.encoder.layers[:used]
    ]
    del tower.encoder.layers[used:]
    embeddings = tower.embeddings
    return VisionTower(
        config=model.config,
        patch_embedding=embeddings.patch_embedding.weight.detach(),
        class_embedding=embeddings.class_embedding.detach(),
        position_embedding=embeddings.position_embedding.weight.detach(),
        pre_norm=(tower.pre_layrnorm.weight.detach(), tower.pre_layrnorm.bias.detach()),
        blocks=blocks,
        projector=(take(projector.linear_1), take(projector.linear_2)),
    )
