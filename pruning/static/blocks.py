"""The blocks that are pruned and their inputs, one block at a time, each seeing what the pruned blocks before it put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.static.packing import PackedSample

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The matrices of a block; those of a group have the same input. In the order in which a block runs them."""


@dataclass(frozen=True)
class Block:
    """One decoder layer of the language model and its matrices, which are called `language.3.self_attn.q_proj`."""

    index: int
    layer: nn.Module
    groups: tuple[tuple[str, ...], ...] = GROUPS

    @property
    def name(self) -> str:
        return f"language.{self.index}"

    def linear(self, short: str) -> nn.Linear:
        found = self.layer.get_submodule(short)
        assert isinstance(found, nn.Linear)
        return found

    def linears(self) -> dict[str, nn.Linear]:
        return {f"{self.name}.{short}": self.linear(short) for group in self.groups for short in group}


def blocks(model: PreTrainedModel) -> list[Block]:
    """The layers of the language model, front to back."""
    return [Block(i, layer) for i, layer in enumerate(model.model.language_model.layers)]


def linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every matrix that can be pruned, by name. Embeddings, norms, vision tower, projector and head are not among them."""
    return {name: linear for block in blocks(model) for name, linear in block.linears().items()}


@dataclass
class BlockInput:
    """What a block is called with for one sample: hidden states [1, n, width] and the rest of its arguments."""

    hidden_states: Tensor
    arguments: dict[str, Any]

    def run(self, block: Block) -> Tensor:
        out = block.layer(self.hidden_states, **self.arguments)
        return out if isinstance(out, Tensor) else out[0]


class _Stop(Exception):
    """Ends a forward pass at the first block; nothing behind it needs to run."""


@torch.no_grad()
def first_inputs(model: PreTrainedModel, samples: Sequence[PackedSample]) -> list[BlockInput]:
    """The inputs of the first block, by sample."""
    inputs: list[BlockInput] = []

    def catch(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments = {key: value for key, value in named.items() if key not in ("hidden_states", "past_key_values")}
        inputs.append(BlockInput((positional[0] if positional else named["hidden_states"]).detach(), arguments))
        raise _Stop

    handle = blocks(model)[0].layer.register_forward_pre_hook(catch, with_kwargs=True)
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
    block: Block, inputs: Sequence[BlockInput], empty: Callable[[int, torch.device], Any], accumulate: Callable[[Any, Tensor], None]
) -> list[Any]:
    """Run a block on every input and gather the statistics of each group's input."""
    statistics: list[Any] = []
    handles = []
    for position, group in enumerate(block.groups):
        first = block.linear(group[0])
        statistics.append(empty(first.in_features, first.weight.device))

        def gather(module: nn.Module, rows: tuple[Tensor, ...], position: int = position) -> None:
            accumulate(statistics[position], rows[0].flatten(0, -2))

        handles.append(first.register_forward_pre_hook(gather))
    try:
        for one in inputs:
            one.run(block)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


def sequential(
    model: PreTrainedModel, samples: Sequence[PackedSample]
) -> Iterator[tuple[Block, list[BlockInput]]]:
    """Each block with its inputs. Change the block's weights, and the next one sees what they put out (as SparseGPT does)."""
    inputs = first_inputs(model, samples)
    for block in blocks(model):
        yield block, inputs
        with torch.no_grad():
            for one in inputs:
                one.hidden_states = one.run(block)
