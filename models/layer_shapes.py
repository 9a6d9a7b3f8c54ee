"""How wide each layer is: structured pruning may leave every layer its own number of heads and of FFN neurons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedConfig


@dataclass(frozen=True)
class Widths:
    """A layer's KV heads, each with all the query heads that share it, and its FFN neurons."""

    kv_heads: int
    ffn: int


def layer_widths(config: PreTrainedConfig) -> list[Widths]:
    """The widths of every layer of a text or vision configuration.

    Its key `layer_widths` has them where transformers' own keys, one number for all layers, cannot say it. Raises ValueError for a
    key that makes no sense.
    """
    saved = getattr(config, "layer_widths", None)
    if saved is None:
        return [Widths(_kv_heads(config), config.intermediate_size)] * config.num_hidden_layers
    if not isinstance(saved, list) or len(saved) != config.num_hidden_layers:
        raise ValueError(f"layer_widths must be a list of {config.num_hidden_layers} layers")
    for i, layer in enumerate(saved):
        if not isinstance(layer, dict) or layer.keys() != {"kv_heads", "ffn"} or not all(map(_is_count, layer.values())):
            raise ValueError(f"layer_widths.{i} must hold kv_heads and ffn, both whole numbers above zero")
    return [Widths(**layer) for layer in saved]


def _kv_heads(config: PreTrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", config.num_attention_heads))  # in a vision tower each head has its own


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def query_heads(config: PreTrainedConfig) -> int:
    """Query heads that share a KV head: the same in every layer, since whole groups go."""
    return int(config.num_attention_heads // _kv_heads(config))


def head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class Half:
    """The heads of a transformers layer, by KV group, or its FFN neurons: the matrices whose rows make them, and the one whose
    columns read them. A unit's rows and columns are neighbours."""

    units: int
    makers: tuple[nn.Linear, ...]
    reader: nn.Linear

    @property
    def unit_weights(self) -> int:
        return sum(linear.weight.numel() for linear in (*self.makers, self.reader)) // self.units


def halves(layer: nn.Module) -> tuple[Half, Half]:
    """Heads and neurons of a layer of a supported text model, or of CLIP."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    made = (attention.q_proj, attention.k_proj, attention.v_proj)
    groups = attention.k_proj.out_features // attention.head_dim
    if hasattr(mlp, "fc1"):
        return Half(groups, made, attention.out_proj), Half(mlp.fc1.out_features, (mlp.fc1,), mlp.fc2)
    neurons = mlp.up_proj.out_features
    return Half(groups, made, attention.o_proj), Half(neurons, (mlp.gate_proj, mlp.up_proj), mlp.down_proj)


def widths_of(layer: nn.Module) -> Widths:
    return Widths(*(half.units for half in halves(layer)))


def columns(units: Tensor, size: int) -> Tensor:
    """The places of units of `size` neighbouring rows or columns each."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def narrow(layer: nn.Module, groups: Tensor, neurons: Tensor) -> None:
    """Keep these KV groups and neurons of a transformers layer, indices ascending, and cut the others out of its matrices.

    The layer runs on as it is: it takes the number of heads from the width of what it computes.
    """
    for half, kept in zip(halves(layer), (groups, neurons), strict=True):
        for linear in half.makers:
            rows = columns(kept, linear.out_features // half.units)
            linear.weight, linear.out_features = _fixed(linear.weight[rows]), len(rows)
            if linear.bias is not None:
                linear.bias = _fixed(linear.bias[rows])
        read = columns(kept, half.reader.in_features // half.units)
        half.reader.weight, half.reader.in_features = _fixed(half.reader.weight[:, read]), len(read)


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().contiguous(), requires_grad=False)


def narrow_to(layer: nn.Module, widths: Widths) -> None:
    """The same, to the first so many of both: for a layer whose weights nobody reads, or that are loaded afterwards."""
    device = halves(layer)[1].reader.weight.device
    narrow(layer, torch.arange(widths.kv_heads, device=device), torch.arange(widths.ffn, device=device))


def towers(model: LlavaForConditionalGeneration) -> dict[str, tuple[PreTrainedConfig, nn.ModuleList]]:
    """Configuration and layers of both towers, by their key in `config.json`."""
    config, inner = model.config, model.model
    return {
        "text_config": (config.text_config, inner.language_model.layers),
        "vision_config": (config.vision_config, inner.vision_tower.encoder.layers),
    }


def changed_keys(model: LlavaForConditionalGeneration) -> dict[str, dict[str, Any]]:
    """What `config.json` must say of a model that was narrowed, by tower: in transformers' own keys where all its layers are alike
    and those can say it, else as `layer_widths`."""
    changed: dict[str, dict[str, Any]] = {}
    for tower, (config, layers) in towers(model).items():
        found = [widths_of(layer) for layer in layers]
        if found == layer_widths(config):
            continue
        first = found[0]
        if len(set(found)) > 1 or not can_say(config, first):
            changed[tower] = {"layer_widths": [asdict(one) for one in found]}
            continue
        changed[tower] = {"intermediate_size": first.ffn}
        if first.kv_heads != _kv_heads(config):
            heads = {"num_attention_heads": first.kv_heads * query_heads(config), "num_key_value_heads": first.kv_heads}
            changed[tower] |= heads | {"head_dim": head_dim(config)}
    return changed


def can_say(config: PreTrainedConfig, widths: Widths) -> bool:
    """Whether transformers builds such layers from its own keys: LlamaConfig wants heads that divide the hidden size, and CLIP
    takes the size of a head from their number."""
    if widths.kv_heads == _kv_heads(config):
        return True
    heads = widths.kv_heads * query_heads(config)
    return config.model_type != "clip_vision_model" and config.hidden_size % heads == 0


class NarrowLlava(LlavaForConditionalGeneration):
    """LLaVA with layers as wide as its configuration says, for `from_pretrained` to fill."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        for part, layers in towers(self).values():
            for layer, widths in zip(layers, layer_widths(part), strict=True):
                if widths != widths_of(layer):
                    narrow_to(layer, widths)


# transformers maps the hub's key names for classes of its own only, and tells them by their module.
NarrowLlava.__module__ = LlavaForConditionalGeneration.__module__
