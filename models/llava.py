"""LLaVA's weights, fused for our own forward. transformers loads them and maps their names; its modules are freed afterwards."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from models.decode import DecodePlan
from models.decode_graph import GraphPlan
from models.families import Layout, arrange, check_tiles, family_of, layout_of
from models.kv_cache import RequestCache
from models.layer_shapes import head_dim, layer_shapes, query_heads
from models.linear import Linear, fuse
from models.ops import rms_norm, swiglu
from models.quantized import Int8Linear
from models.sparse import AnyLinear
from models.vision import TOWERS
from models.vision.features import ImageFeatures, VisionEncoder
from models.weight_format import holder

TEXT_MODELS = ("llama", "mistral", "qwen2")


class UnsupportedCheckpoint(ValueError):
    """The checkpoint needs something that this forward does not compute; the message names it."""


@dataclass
class DecoderLayer:
    """One layer of the language model. `qkv` and `gate_up` are the fused projections, in this order."""

    heads: int
    kv_heads: int
    input_norm: Tensor
    qkv: AnyLinear
    out: AnyLinear
    post_norm: Tensor
    gate_up: AnyLinear
    down: AnyLinear

    def linears(self) -> dict[str, AnyLinear]:
        return {"qkv": self.qkv, "out": self.out, "gate_up": self.gate_up, "down": self.down}

    def behind_attention(self, x: Tensor, mixed: Tensor, eps: float) -> Tensor:
        """The rest of the layer: its input x [rows, width] and what attention mixed [rows, heads * head_dim] to [rows, width]."""
        x = self.out(mixed).add_(x)
        return self.down(swiglu(self.gate_up(rms_norm(x, self.post_norm, eps)))).add_(x)


@dataclass
class Llava:
    config: PreTrainedConfig
    vision: VisionEncoder
    embedding: Tensor | Int8Linear  # [vocab, width]; where it is tied to the head and quantized, it is the head
    decoder_layers: list[DecoderLayer]
    norm: Tensor
    head: Linear | Int8Linear
    inv_freq: Tensor  # [head_dim / 2], float32
    rope_scaling: float
    newline: Tensor | None = None  # [width], behind each row of a tiled picture

    @property
    def device(self) -> torch.device:
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.dtype

    @property
    def num_layers(self) -> int:
        return len(self.decoder_layers)

    @property
    def kv_heads(self) -> list[int]:
        """Of each layer: structured pruning may leave them different numbers."""
        return [layer.kv_heads for layer in self.decoder_layers]

    @cached_property
    def head_dim(self) -> int:
        return head_dim(self.config.text_config)

    @cached_property
    def eps(self) -> float:
        return float(self.config.text_config.rms_norm_eps)

    @cached_property
    def decode_plan(self) -> DecodePlan | GraphPlan | None:
        """For decoding in one native call, or one CUDA graph; None where it runs layer by layer."""
        if self.device.type == "cuda":
            return GraphPlan.of(self)
        return DecodePlan.of(
            self.decoder_layers, self.norm, self.head, self.inv_freq, self.rope_scaling, self.head_dim, self.eps
        )

    def new_cache(self, rows: Sequence[int]) -> RequestCache:
        """An empty cache for one request, `rows` by layer."""
        return RequestCache(rows, self.kv_heads, self.head_dim, self.dtype, self.device)

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together. A sliding window bounds it: within the window, attention is full."""
        text = self.config.text_config
        return int(min(text.max_position_embeddings, getattr(text, "sliding_window", None) or 1 << 60))

    @property
    def visual_tokens_per_image(self) -> int:
        return visual_tokens_per_image(self.config)

    def encode(self, pixels: Tensor, layout: Layout, patch_ratio: float = 1.0) -> ImageFeatures:
        """One picture, its tiles `pixels` [tiles, 3, height, width], to the features of its prompt [1, visual_tokens, width]. The
        tower's later layers see `patch_ratio` of the patches."""
        features = self.vision(pixels.to(self.device, self.dtype), patch_ratio)
        if not layout.newline:
            return features
        return ImageFeatures(arrange(features.tokens, layout, self.newline)[None], layout=layout)

    def embed(self, ids: Tensor) -> Tensor:
        if isinstance(self.embedding, Int8Linear):
            return self.embedding.rows(ids).to(self.dtype)
        return F.embedding(ids, self.embedding)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [rows, 1, head_dim / 2] at `positions` [rows], in the model's dtype."""
        angles = positions[:, None, None].float() * self.inv_freq
        return (angles.cos() * self.rope_scaling).to(self.dtype), (angles.sin() * self.rope_scaling).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [rows, width] to float32 logits [rows, vocab]."""
        return self.head.unrounded(rms_norm(hidden, self.norm, self.eps))

    def linears(self) -> dict[str, AnyLinear]:
        """Every matrix by name, `language.3.qkv` and the like."""
        layers = enumerate(self.decoder_layers)
        named = {f"language.{i}.{name}": matrix for i, layer in layers for name, matrix in layer.linears().items()}
        named |= {f"vision.{name}": matrix for name, matrix in self.vision.tower.linears().items()}
        named |= {f"projector.{i}": matrix for i, matrix in enumerate(self.vision.projector)}
        return named | {"head": self.head}

    @property
    def weight_bytes(self) -> int:
        return sum(self.bytes_by_format().values())

    def bytes_by_format(self) -> dict[str, int]:
        """Resident bytes of the language model's matrices and embedding, the projector and the vision tower: `dense`, `packed`,
        `bitmask`, `2:4`, `int8`, `nf4`."""
        held = {"dense": self.vision.tower.other_bytes}
        if isinstance(self.embedding, Tensor) and isinstance(self.head, Linear) and not _tied(self.embedding, self.head.weight):
            held["dense"] += self.embedding.nbytes
        for matrix in self.linears().values():
            held[matrix.format] = held.get(matrix.format, 0) + matrix.bytes
        return held

    def sparsity(self) -> dict[str, float]:
        """Share of zeros among the weights of each module: `vision`, `projector`, `language`, `head`."""
        modules: dict[str, list[AnyLinear]] = {}
        for name, matrix in self.linears().items():
            modules.setdefault(name.partition(".")[0], []).append(matrix)
        return {name: 1 - sum(m.nonzeros for m in held) / sum(m.size for m in held) for name, held in modules.items()}


def visual_tokens_per_image(config: PreTrainedConfig) -> int:
    """Of a picture as large as the tower sees; where pictures are tiled, larger ones have more."""
    size = config.vision_config.image_size
    return layout_of(config, size, size).visual_tokens


def most_visual_tokens_per_image(config: PreTrainedConfig) -> int:
    """Of the largest picture."""
    if not family_of(config).tiled:
        return visual_tokens_per_image(config)
    return max(layout_of(config, height, width).visual_tokens for height, width in config.image_grid_pinpoints)


def check_supported(config: PreTrainedConfig) -> None:
    """Raise UnsupportedCheckpoint, naming what is missing, for a configuration that the forward does not compute."""
    try:
        family_of(config)
    except ValueError as error:
        raise UnsupportedCheckpoint(f"config.json: {error}") from error
    text, vision = config.text_config, config.vision_config
    if vision.model_type not in TOWERS:
        raise UnsupportedCheckpoint(f"vision tower {vision.model_type!r} is not supported; {', '.join(TOWERS)} are")
    if text.model_type not in TEXT_MODELS:
        raise UnsupportedCheckpoint(f"text model {text.model_type!r} is not supported; {', '.join(TEXT_MODELS)} are")
    if text.hidden_act not in ("silu", "swish"):
        raise UnsupportedCheckpoint(f"text activation {text.hidden_act!r} is not supported; silu is")
    rope = text.rope_parameters["rope_type"]
    if rope in ("dynamic", "longrope"):
        raise UnsupportedCheckpoint(f"RoPE type {rope!r} changes with the prompt's length and is not supported")
    try:
        TOWERS[vision.model_type].check_supported(config)
        check_tiles(config)
        layer_shapes(text)
    except ValueError as error:
        raise UnsupportedCheckpoint(f"config.json: {error}") from error


@torch.no_grad()
def from_transformers(
    model: PreTrainedModel, quantization: str | None = None, *, saved: bool = False, quantize_embedding: bool = True,
    device: str | None = None,
) -> Llava:  # fmt: skip
    """Take the weights out of a transformers model and leave it empty, so that they are held once.

    Each matrix gets its format at once (see `models.weight_format`), on `device`, so that a device need not hold all weights as
    they were. The head stays dense, as it is seldom pruned and decides every token. Where it is tied to the embedding, quantizing
    holds both in 8 bits: together they are a fifth of `smol`. `saved` says that the model's files held quantized weights.
    """
    config = model.config
    check_supported(config)
    text, inner = model.model.language_model, model.model
    device = device or model.device
    hold = {module: holder(module, quantization, saved) for module in ("vision", "projector", "language")}
    inner.vision_tower.to(device)
    projector = inner.multi_modal_projector.to(device)
    vision = VisionEncoder(
        # First: its unused layers are freed.
        tower=TOWERS[config.vision_config.model_type].from_transformers(model, hold["vision"]),
        projector=(hold["projector"](fuse(projector.linear_1)), hold["projector"](fuse(projector.linear_2))),
        activation=config.projector_hidden_act,
    )
    layers = []
    for layer, shape in zip(text.layers, layer_shapes(config.text_config), strict=True):
        layer.to(device)
        layers.append(
            DecoderLayer(
                heads=shape.kv_heads * query_heads(config.text_config),
                kv_heads=shape.kv_heads,
                input_norm=layer.input_layernorm.weight.detach(),
                qkv=hold["language"](fuse(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)),
                out=hold["language"](fuse(layer.self_attn.o_proj)),
                post_norm=layer.post_attention_layernorm.weight.detach(),
                gate_up=hold["language"](fuse(layer.mlp.gate_proj, layer.mlp.up_proj)),
                down=hold["language"](fuse(layer.mlp.down_proj)),
            )
        )
        return_freed_memory()
    model.to(device)
    embedding, head = _embedding_and_head(model, quantize=quantization is not None and quantize_embedding)
    return Llava(
        config=config,
        vision=vision,
        embedding=embedding,
        decoder_layers=layers,
        norm=text.norm.weight.detach(),
        head=head,
        inv_freq=text.rotary_emb.inv_freq.float(),
        rope_scaling=float(text.rotary_emb.attention_scaling),
        newline=model.model.image_newline.detach() if family_of(config).tiled else None,
    )


def _embedding_and_head(model: PreTrainedModel, *, quantize: bool) -> tuple[Tensor | Int8Linear, Linear | Int8Linear]:
    embedding = model.model.language_model.embed_tokens.weight.detach()
    tied, head = _tied(embedding, model.lm_head.weight), fuse(model.lm_head)
    if not (quantize and tied):
        return embedding, head
    quantized = Int8Linear.of(head)
    return quantized, quantized


def _tied(embedding: Tensor, head: Tensor) -> bool:
    return embedding.data_ptr() == head.data_ptr()


def return_freed_memory() -> None:
    """Return the memory of the unfused matrices: glibc keeps freed blocks of up to 32 MB, in sum nearly a second copy."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
