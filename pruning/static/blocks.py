"""What can be pruned, and the walk through it: one block at a time, each seeing what the pruned blocks before it put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from models.vision.clip import feature_layers
from pruning.static.data import Sample

# Matrices of a block that read the same rows, in the order in which a block runs them.
LANGUAGE_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
VISION_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("mlp.fc1",),
    ("mlp.fc2",),
)
TOWERS = ("vision", "language")


@dataclass(frozen=True)
class Block:
    """One transformer layer and its matrices in groups that share their input; names are `language.3.self_attn.q_proj`."""

    tower: str
    index: int
    module: nn.Module
    groups: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        return f"{self.tower}.{self.index}"

    def linear(self, short: str) -> nn.Linear:
        found = self.module.get_submodule(short)
        assert isinstance(found, nn.Linear)
        return found

    def linears(self) -> dict[str, nn.Linear]:
        return {f"{self.name}.{short}": self.linear(short) for group in self.groups for short in group}


def blocks(model: LlavaForConditionalGeneration, tower: str) -> list[Block]:
    """The layers of a tower, front to back; a vision layer whose output nobody reads is left out."""
    if tower == "language":
        return [Block(tower, i, layer, LANGUAGE_GROUPS) for i, layer in enumerate(model.model.language_model.layers)]
    used = max(feature_layers(model.config))
    return [Block(tower, i, m, VISION_GROUPS) for i, m in enumerate(model.model.vision_tower.encoder.layers[:used])]


def linears(model: LlavaForConditionalGeneration, towers: Sequence[str] = TOWERS) -> dict[str, nn.Linear]:
    """Every matrix that can be pruned, by name. Embeddings, norms, projector and head are not among them."""
    return {name: linear for tower in towers for block in blocks(model, tower) for name, linear in block.linears().items()}


@dataclass
class Call:
    """What a block is called with for one sample: rows [1, n, width], the rest of its arguments, and what each row counts."""

    hidden: Tensor
    arguments: dict[str, Any]
    weights: Tensor  # [n] float32

    def run(self, block: Block) -> Tensor:
        out = block.module(self.hidden, **self.arguments)
        return out if isinstance(out, Tensor) else out[0]


class _Reached(Exception):
    """Ends a forward at the first block; nothing behind it needs to run."""


@torch.no_grad()
def first_calls(
    model: LlavaForConditionalGeneration, tower: str, samples: Sequence[Sample], visual_weight: float = 1.0
) -> list[Call]:
    """What the first block of a tower is called with, by sample; a visual row of the language model counts `visual_weight`."""
    calls: list[Call] = []

    def keep(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        arguments = {key: value for key, value in named.items() if key != "hidden_states"}
        # An encoder layer takes its mask by position, a decoder layer everything but the rows by name.
        arguments |= dict(zip(("attention_mask",), positional[1:], strict=False))
        hidden = positional[0] if positional else named["hidden_states"]
        calls.append(Call(hidden.detach(), arguments | _no_cache(arguments), torch.ones(hidden.shape[1], device=hidden.device)))
        raise _Reached

    handle = blocks(model, tower)[0].module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for sample in samples:
            try:
                model(**sample.inputs(model), use_cache=False)
            except _Reached:
                if tower == "language":
                    calls[-1].weights[sample.ids.to(model.device) == model.config.image_token_id] = visual_weight
    finally:
        handle.remove()
    return calls


def _no_cache(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: None for key in ("past_key_values",) if key in arguments}


@torch.no_grad()
def collect(
    block: Block, calls: Sequence[Call], empty: Callable[[int, torch.device], Any],
    accumulate: Callable[[Any, Tensor, Tensor], None],
) -> list[Any]:  # fmt: skip
    """Run a block on every call and gather the statistics of each group's input."""
    statistics: list[Any] = []
    current: list[Tensor] = []
    handles = []
    for position, group in enumerate(block.groups):
        first = block.linear(group[0])
        statistics.append(empty(first.in_features, first.weight.device))

        def gather(module: nn.Module, inputs: tuple[Tensor, ...], position: int = position) -> None:
            accumulate(statistics[position], inputs[0].flatten(0, -2), current[0])

        handles.append(first.register_forward_pre_hook(gather))
    try:
        for call in calls:
            current[:] = [call.weights]
            call.run(block)
    finally:
        for handle in handles:
            handle.remove()
    return statistics


@torch.no_grad()
def advance(block: Block, calls: Sequence[Call]) -> None:
    """Put the block's output in the place of its input."""
    for call in calls:
        call.hidden = call.run(block)


def walk(
    model: LlavaForConditionalGeneration, tower: str, samples: Sequence[Sample], visual_weight: float = 1.0
) -> Iterator[tuple[Block, list[Call]]]:
    """Each block of a tower with its calls. Change the block's weights, and the next one sees what they put out."""
    calls = first_calls(model, tower, samples, visual_weight)
    for block in blocks(model, tower):
        yield block, calls
        advance(block, calls)
