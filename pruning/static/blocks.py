"""The blocks that are pruned and their inputs, one block at a time, each seeing what the pruned blocks before it put out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.vision.vit import feature_layers
from pruning.static.packing import PackedSample

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GROUPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "language": (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    "vision": (QKV, ("self_attn.out_proj",), ("mlp.fc1",), ("mlp.fc2",)),
}
"""The matrices of a block, by module; those of a group have the same input. In the order in which a block runs them."""


@dataclass(frozen=True)
class Block:
    """One layer of the language model or of a vision transformer, and its matrices, which are called `language.3.self_attn.q_proj`
    or `vision.3.mlp.fc1`."""

    module: str
    index: int
    layer: nn.Module
    groups: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        return f"{self.module}.{self.index}"

    def linear(self, short: str) -> nn.Linear:
        found = self.layer.get_submodule(short)
        assert isinstance(found, nn.Linear)
        return found

    def linears(self) -> dict[str, nn.Linear]:
        return {f"{self.name}.{short}": self.linear(short) for group in self.groups for short in group}


def blocks(model: PreTrainedModel, module: str = "language") -> list[Block]:
    """The layers of the language model, or those of a vision transformer that run: none behind the feature layer. Front to back."""
    layers = model.model.language_model.layers
    if module == "vision":
        layers = model.model.vision_tower.encoder.layers[: max(feature_layers(model.config))]
    return [Block(module, i, layer, GROUPS[module]) for i, layer in enumerate(layers)]


def linears(model: PreTrainedModel, modules: Iterable[str] = ("language",)) -> dict[str, nn.Linear]:
    """Every matrix of these modules' blocks, by name. Embeddings, norms, projector and head are not among them."""
    return {name: linear for module in modules for block in blocks(model, module) for name, linear in block.linears().items()}


@dataclass
class BlockInput:
    """What a block is called with for one sample: hidden states [1, n, width], in the tower [tiles, n, width], and the rest of its
    arguments."""

    hidden_states: Tensor
    positional: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, block: Block) -> Tensor:
        out = block.layer(self.hidden_states, *self.positional, **self.named)
        return out if isinstance(out, Tensor) else out[0]


class _Stop(Exception):
    """Ends a forward pass at the first block; nothing behind it needs to run."""


@torch.no_grad()
def first_inputs(model: PreTrainedModel, samples: Sequence[PackedSample], module: str = "language") -> list[BlockInput]:
    """The inputs of a module's first block, by sample."""
    inputs: list[BlockInput] = []

    def catch(layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        others = {key: value for key, value in named.items() if key not in ("hidden_states", "past_key_values")}
        inputs.append(BlockInput((positional[0] if positional else named["hidden_states"]).detach(), positional[1:], others))
        raise _Stop

    handle = blocks(model, module)[0].layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for sample in samples:
            try:
                model(**sample.inputs(model), use_cache=False)
            except _Stop:
                pass
    finally:
        handle.remove()
    return inputs


@torch.no_grad()
def input_statistics(
    block: Block, inputs: Sequence[BlockInput], empty: Callable[[int, torch.device], Any],
    accumulate: Callable[[Any, Tensor], None], *, biases: bool = False,
) -> list[Any]:  # fmt: skip
    """Run a block on every input and gather the statistics of each group's input.

    With `biases`, a matrix's bias is taken for the weight of one more input, the last, which is always one.
    """
    statistics: list[Any] = []
    handles = []
    for position, group in enumerate(block.groups):
        first = block.linear(group[0])
        bias = biases and first.bias is not None
        statistics.append(empty(first.in_features + bias, first.weight.device))

        def gather(module: nn.Module, given: tuple[Tensor, ...], position: int = position, bias: bool = bias) -> None:
            rows = given[0].flatten(0, -2)
            accumulate(statistics[position], F.pad(rows, (0, 1), value=1.0) if bias else rows)

        handles.append(first.register_forward_pre_hook(gather))
    try:
        for one in inputs:
            one.run(block)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def sequential(
    model: PreTrainedModel, samples: Sequence[PackedSample], module: str = "language"
) -> Iterator[tuple[Block, list[BlockInput]]]:
    """Each block of a module with its inputs. Change the block's weights, and the next one sees what they put out (as SparseGPT
    does)."""
    inputs = first_inputs(model, samples, module)
    for block in blocks(model, module):
        yield block, inputs
        with torch.no_grad():
            for one in inputs:
                one.hidden_states = one.run(block)
