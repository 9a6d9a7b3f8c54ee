"""LLaVAs with random weights: tiny ones for tests, real geometries for benchmarks; no files."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from models.families import family_of

GEOMETRIES: dict[str, dict[str, Any]] = {
    "smol-135m": {"layers": 30, "width": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "vocab": 49152},
    "tinyllava-1.1b": {"layers": 22, "width": 2048, "ffn": 5632, "heads": 32, "kv_heads": 4, "vocab": 32064},
    "llava-1.5-7b": {"layers": 32, "width": 4096, "ffn": 11008, "heads": 32, "kv_heads": 32, "vocab": 32064},
    "llava-1.5-13b": {"layers": 40, "width": 5120, "ffn": 13824, "heads": 40, "kv_heads": 40, "vocab": 32064},
}
"""Language models at real size. All see 576 visual tokens, by CLIP-L/336; `smol-135m` has a smaller tower."""
IMAGE_TOKEN = 32000


def text_config(
    kind: str = "llama", *, layers: int, width: int, ffn: int, heads: int, kv_heads: int, vocab: int, bias: bool = False
) -> PreTrainedConfig:
    config = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}[kind]
    extra = {"attention_bias": bias, "mlp_bias": bias} if kind == "llama" else {}
    return config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=ffn, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False, **extra,
    )  # fmt: skip


def geometry_config(name: str) -> LlavaConfig:
    """A geometry at real size, or `tiny`. Raises ValueError for another name."""
    if name == "tiny":
        return tiny_config()
    if name not in GEOMETRIES:
        raise ValueError(f"geometry {name!r} is not one of {', '.join(GEOMETRIES)}, tiny")
    width, layers = (384, 12) if name == "smol-135m" else (1024, 24)
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text_config(**GEOMETRIES[name]), image_token_index=IMAGE_TOKEN,
        image_seq_length=576, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip


def tiny_config(
    kind: str = "llama", *, kv_heads: int = 2, bias: bool = False, layers: int = 3, family: str = "llava", tower: str = "clip"
) -> Any:
    """Sixteen visual tokens a tile, a few narrow layers, vocabulary of 128 with the image token at 127."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = {
        "clip": CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=32),
        "siglip": SiglipVisionConfig(**sizes, image_size=32, patch_size=8, vision_use_head=False),
    }[tower]
    text = text_config(kind, layers=layers, width=48, ffn=96, heads=4, kv_heads=kv_heads, vocab=128, bias=bias)
    common = {
        "vision_config": vision, "text_config": text, "image_token_index": 127, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }  # fmt: skip
    if family == "llava":
        return LlavaConfig(**common, image_seq_length=16)
    if family == "llava_next":
        grids = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
        return LlavaNextConfig(**common, image_grid_pinpoints=grids, image_seq_length=16)
    sides = range(32, 32 * 4, 32)
    grids = [[height, width] for height in sides for width in sides]
    return LlavaOnevisionConfig(
        **common, image_grid_pinpoints=grids, vision_aspect_ratio="anyres_max_4", video_token_index=126
    )  # fmt: skip


def random_model(
    config: PreTrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """A transformers model with random weights, made in `dtype` at once so that no larger copy ever exists."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = family_of(config).model(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():  # biases start at zero, and a zero bias would hide that it is left out
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()
