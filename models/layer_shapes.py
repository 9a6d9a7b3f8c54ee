"""The shape of each layer: structured pruning may leave every layer its own number of heads and FFN neurons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LayerShape:
    """A layer's KV heads, each with all the query heads that share it, and its FFN neurons."""

    kv_heads: int
    ffn: int


def layer_shapes(config: PreTrainedConfig) -> list[LayerShape]:
    """The shapes of all layers of a text or vision configuration.

    They stand in its key `layer_shapes` where transformers' own keys cannot say them. Raises ValueError for a key that is wrong.
    """
    saved = getattr(config, "layer_shapes", None)
    if saved is None:
        return [LayerShape(_kv_heads(config), config.intermediate_size)] * config.num_hidden_layers
    if not isinstance(saved, list) or len(saved) != config.num_hidden_layers:
        raise ValueError(f"layer_shapes must be a list of {config.num_hidden_layers} layers")
    for i, layer in enumerate(saved):
        if not isinstance(layer, dict) or layer.keys() != {"kv_heads", "ffn"} or not all(map(_is_count, layer.values())):
            raise ValueError(f"layer_shapes.{i} must hold kv_heads and ffn, both whole numbers above zero")
    return [LayerShape(**layer) for layer in saved]


def _kv_heads(config: PreTrainedConfig) -> int:
    return int(getattr(config, "num_key_value_heads", config.num_attention_heads))  # in a vision tower each head has its own


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def query_heads(config: PreTrainedConfig) -> int:
    """Query heads of a KV head: the same in every layer, since whole groups are removed."""
    return int(config.num_attention_heads // _kv_heads(config))


def head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class CoupledUnits:
    """The KV groups of a transformers layer, or its FFN neurons: what structured pruning removes, by unit.

    `producers` compute the units in their rows, `consumer` reads them in its columns; those of a unit lie side by side.
    """

    units: int
    producers: tuple[nn.Linear, ...]
    consumer: nn.Linear

    @property
    def weights_per_unit(self) -> int:
        return sum(linear.weight.numel() for linear in (*self.producers, self.consumer)) // self.units


def coupled_units(layer: nn.Module) -> tuple[CoupledUnits, CoupledUnits]:
    """KV groups and neurons of a layer of a supported text model, or of a vision transformer."""
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    groups = attention.k_proj.out_features // attention.head_dim
    if hasattr(mlp, "fc1"):
        return CoupledUnits(groups, qkv, attention.out_proj), CoupledUnits(mlp.fc1.out_features, (mlp.fc1,), mlp.fc2)
    neurons = mlp.up_proj.out_features
    return CoupledUnits(groups, qkv, attention.o_proj), CoupledUnits(neurons, (mlp.gate_proj, mlp.up_proj), mlp.down_proj)


def shape_of(layer: nn.Module) -> LayerShape:
    return LayerShape(*(coupled.units for coupled in coupled_units(layer)))


def unit_indices(units: Tensor, size: int) -> Tensor:
    """The rows or columns of units, `size` each."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).flatten()


def slice_layer(layer: nn.Module, groups: Tensor, neurons: Tensor) -> None:
    """Keep these KV groups and neurons of a transformers layer, indices ascending, and cut the others out of its matrices.

    The layer still runs: transformers infers the number of heads from the widths of its projections.
    """
    for coupled, kept in zip(coupled_units(layer), (groups, neurons), strict=True):
        for linear in coupled.producers:
            rows = unit_indices(kept, linear.out_features // coupled.units)
            linear.weight, linear.out_features = _fixed(linear.weight[rows]), len(rows)
            if linear.bias is not None:
                linear.bias = _fixed(linear.bias[rows])
        read = unit_indices(kept, coupled.consumer.in_features // coupled.units)
        coupled.consumer.weight, coupled.consumer.in_features = _fixed(coupled.consumer.weight[:, read]), len(read)


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().contiguous(), requires_grad=False)


def slice_to_shape(layer: nn.Module, shape: LayerShape) -> None:
    """Keep the first groups and neurons: for a layer whose weights nobody reads, or that are loaded afterwards."""
    device = coupled_units(layer)[1].consumer.weight.device
    slice_layer(layer, torch.arange(shape.kv_heads, device=device), torch.arange(shape.ffn, device=device))


def towers(model: PreTrainedModel) -> dict[str, tuple[PreTrainedConfig, nn.ModuleList]]:
    """Configuration and layers of the towers that have such layers, by their key in `config.json`."""
    config, inner = model.config, model.model
    found = {"text_config": (config.text_config, inner.language_model.layers)}
    if encoder := getattr(inner.vision_tower, "encoder", None):  # a convolutional tower has none
        found["vision_config"] = (config.vision_config, encoder.layers)
    return found


def changed_keys(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """What `config.json` must say of a sliced model, by tower.

    In transformers' own keys where all layers have one shape that those can express, else as `layer_shapes`.
    """
    changed: dict[str, dict[str, Any]] = {}
    for tower, (config, layers) in towers(model).items():
        found = [shape_of(layer) for layer in layers]
        if found == layer_shapes(config):
            continue
        first = found[0]
        if len(set(found)) > 1 or not transformers_can_build(config, first):
            changed[tower] = {"layer_shapes": [asdict(one) for one in found]}
            continue
        changed[tower] = {"intermediate_size": first.ffn}
        if first.kv_heads != _kv_heads(config):
            heads = {"num_attention_heads": first.kv_heads * query_heads(config), "num_key_value_heads": first.kv_heads}
            changed[tower] |= heads | {"head_dim": head_dim(config)}
    return changed


def transformers_can_build(config: PreTrainedConfig, shape: LayerShape) -> bool:
    """Whether transformers builds such layers from its own keys.

    LlamaConfig wants heads that divide the hidden size, and vision transformers compute the size of a head from their number.
    """
    if shape.kv_heads == _kv_heads(config):
        return True
    heads = shape.kv_heads * query_heads(config)
    return config.model_type not in ("clip_vision_model", "siglip_vision_model") and config.hidden_size % heads == 0


def sliced(kind: Any) -> Any:
    """A transformers class whose layers have the shapes that its configuration says, for `from_pretrained` to fill."""

    class Sliced(kind):
        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            for part, layers in towers(self).values():
                for layer, shape in zip(layers, layer_shapes(part), strict=True):
                    if shape != shape_of(layer):
                        slice_to_shape(layer, shape)

    # transformers maps the hub's key names only for classes of its own, which it knows by their module.
    Sliced.__module__ = kind.__module__
    return Sliced
