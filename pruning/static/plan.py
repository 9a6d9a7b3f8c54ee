"""What a run of `espalier prune` will need: disk and memory by the sizes of its parts, time by parts that are measured first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from models.checkpoint import DTYPES, weight_bytes, weight_files
from models.saving import tensor_places, tensor_shapes
from pruning.static import search, structured
from pruning.static.blocks import GROUPS, blocks, first_inputs, linears
from pruning.static.compressed import compressed_bytes
from pruning.static.criteria import CRITERIA, pruned_weights
from pruning.static.evolution import SPREAD_POLICIES
from pruning.static.fitness import Divergence
from pruning.static.masks import Pattern
from pruning.static.packing import PackedSample
from pruning.static.recipe import Recipe
from pruning.static.scores import answer_loss

MATRICES = {module: {f"{name}.weight" for group in groups for name in group} for module, groups in GROUPS.items()}
TRIAL = 4
"""Samples on which a block is pruned to see how long that takes."""
WORKING, WORKING_ALPS = 12, 110
"""Bytes for each weight of a matrix while it is pruned; by ALPS they were measured."""
BACKWARD = 3
"""A pass with its gradients, in passes without."""


@dataclass(frozen=True)
class Disk:
    """Bytes that a run writes: `blocks`, those that are finished; the search's `database`; the `result`. What was not kept of
    blocks and database goes before the result is written."""

    blocks: int
    database: int
    result: int

    @property
    def most(self) -> int:
        """At one time."""
        return max(self.blocks + self.database, max(self.blocks, self.database) + self.result)


def disk(recipe: Recipe, checkpoint: Path, dtype: str) -> Disk:
    """For a run in `dtype`. Reads the heads of the checkpoint's files alone."""
    weights, itemsize, size = matrix_weights(checkpoint), _itemsize(checkpoint, dtype), weight_bytes(checkpoint)
    if recipe.pattern == "structured":
        return Disk(round(sum(weights[module] * (1 - share) * itemsize for module, share in recipe.shares.items())), 0, size)
    density = 1 - recipe.sparsity
    entry = compressed_bytes(weights["language"], density, itemsize)
    if recipe.allocation != "search":
        return Disk(entry, 0, size)
    return Disk(entry, (2 * search.levels(weights["language"], density, itemsize, size) + 1) * entry, size)


def matrix_weights(checkpoint: Path) -> dict[str, int]:
    """Of the matrices that can be pruned, by module: none of a convolutional tower, and those of a transformer's layers that do not
    run too. Reads the heads of the checkpoint's files alone."""
    found = dict.fromkeys(MATRICES, 0)
    for name, shape in tensor_shapes(checkpoint).items():
        if module := _module(name):
            found[module] += shape.numel()
    return found


def _module(name: str) -> str | None:
    """Of a tensor's plain name, if it can be pruned."""
    module, _, matrix = name.partition(".")
    return module if matrix.partition(".")[2] in MATRICES.get(module, ()) else None


def _itemsize(checkpoint: Path, dtype: str) -> int:
    """Bytes of a weight: of the dtype asked for, or that of the files."""
    if dtype in DTYPES:
        return DTYPES[dtype].itemsize
    shard, key = next(place for name, place in tensor_places(checkpoint).items() if _module(name))
    with safe_open(shard, "pt") as file:
        return 4 if file.get_slice(key).get_dtype() == "F32" else 2


@dataclass(frozen=True)
class Memory:
    """Bytes of the process that prunes: `weights` of the model; `samples`, as the blocks read them, and the dense model's answers;
    and the largest `step` of the work."""

    weights: int
    samples: int
    step: int

    @property
    def most(self) -> int:
        return self.weights + self.samples + self.step


def memory(recipe: Recipe, model: PreTrainedModel, samples: Sequence[PackedSample], checkpoint: Path) -> Memory:
    """On a CPU, where the process holds all; on a GPU what writing needs is in the other memory."""
    text, itemsize = model.config.text_config, model.dtype.itemsize
    rows, answers = max(len(sample.ids) for sample in samples), max(len(sample.before_answers) for sample in samples)
    width, ffn = text.hidden_size, text.intermediate_size
    run, gather, prune = _block_bytes(recipe, model, "language", rows)
    answer = 16 * answers * text.vocab_size
    steps = [
        run + gather, prune, run + answer,
        2 * max(shard.stat().st_size for shard in weight_files(checkpoint)),  # when the result is written
    ]  # fmt: skip
    if recipe.allocation == "search":
        size = disk(recipe, checkpoint, str(model.dtype).removeprefix("torch."))
        steps[1] += size.database // len(blocks(model))
        # What a pass keeps for its gradients: two norms in float32, the attention's and the FFN's inputs.
        steps.append(answer + rows * text.num_hidden_layers * (8 * width + (4 * width + 3 * ffn) * itemsize))
    held = [s.picture.pixels.nbytes + len(s.ids) * (width + len(s.ids)) * itemsize + len(s.answers) * 24 for s in samples]
    if recipe.allocation == "search":
        vision = model.config.vision_config.hidden_size
        held += [len(s.before_answers) * width * itemsize + s.picture.layout.visual_tokens * vision * itemsize for s in samples]
    kept = sum(held)
    if recipe.tower:
        patches = model.model.vision_tower.embeddings.position_embedding.num_embeddings
        tiles = [len(s.picture.pixels) for s in samples]
        run, gather, prune = _block_bytes(recipe, model, "vision", max(tiles) * patches)
        steps += [run + gather, prune]
        inputs = sum(tiles) * patches * model.config.vision_config.hidden_size * itemsize
        kept = max(kept, inputs + sum(s.picture.pixels.nbytes for s in samples))
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in model.parameters()}
    return Memory(sum(weights.values()), kept, max(steps))


def _block_bytes(recipe: Recipe, model: PreTrainedModel, module: str, rows: int) -> tuple[int, int, int]:
    """What a block of a module takes to run on so many `rows`, to hold its statistics, and to be pruned with them."""
    block = blocks(model, module)[0]
    inputs = [block.linear(group[0]).in_features for group in block.groups]
    largest = max(linear.weight.numel() for linear in block.linears().values())
    statistics = sum(4 * size**2 for size in inputs) if recipe.criterion in ("obs", "alps") or recipe.pattern == "structured" else 0
    inverse = max(inputs) ** 2 * (32 if recipe.pattern == "structured" else 16 if statistics else 0)
    run = rows * (3 * max(inputs) + 8 * min(inputs)) * model.dtype.itemsize
    working = WORKING_ALPS if recipe.criterion == "alps" else WORKING
    return run, statistics, statistics + max(inverse, inverse // 4 + working * largest)


@torch.no_grad()
def seconds(recipe: Recipe, model: PreTrainedModel, samples: Sequence[PackedSample], size: Disk) -> dict[str, float]:
    """By part of the work, from parts that are timed: passes over a sample of middle length, with the vision tower and without, and
    pruning the first block."""
    middle = sorted(samples, key=lambda sample: len(sample.ids))[len(samples) // 2]
    divergence = Divergence.from_dense(model, [middle])  # whatever happens once
    whole, one = _timed(lambda: answer_loss(model, middle), model), _timed(lambda: divergence([0]), model)
    count, layers = len(samples), len(blocks(model))
    sequential = count * (whole + one)  # the tower, and two passes over all blocks
    found: dict[str, float] = {}
    if recipe.tower:
        seen = _timed(lambda: model.model.get_image_features(**middle.image(model)), model)
        found["tower"] = 2 * count * seen + len(blocks(model, "vision")) * _block_seconds(recipe, model, samples, "vision")
    if recipe.sparsity:
        block = _block_seconds(recipe, model, samples, "language")
        found["blocks"] = sequential + layers * block
    if recipe.allocation == "ecoflap":
        found["scores"] = count * (one * len(linears(model)) if recipe.score == "zo" else whole * BACKWARD)
    elif recipe.allocation == "owl":
        found["scores"] = sequential
    elif recipe.allocation == "search":
        found["levels"] = count * whole + sequential + layers * block * size.database / size.blocks
        found["search"] = _passes(recipe, count) * one
    return found


def _block_seconds(recipe: Recipe, model: PreTrainedModel, samples: Sequence[PackedSample], module: str) -> float:
    """Of one level of the first block, from few samples. An error is left to the run, which has more of them."""
    block, pattern = blocks(model, module)[0], "2:4" if recipe.pattern == "2:4" else "unstructured"
    inputs = first_inputs(model, samples[:TRIAL], module)
    counts = {name: [linear.weight.numel() // 2] for name, linear in block.linears().items()}
    keep: Callable[[str, int, Tensor], None] = lambda name, place, weight: None  # noqa: E731

    def prune() -> None:
        with suppress(ValueError):
            if recipe.pattern == "structured":
                structured.removals(block, inputs, recipe.criterion)
            else:
                pruned_weights(block, inputs, CRITERIA[recipe.criterion], counts, cast(Pattern, pattern), keep)

    return _timed(prune, model)


def _passes(recipe: Recipe, count: int) -> float:
    """Over one sample, in a whole search: the spread of the fitness, the generations, the projector, the last comparison."""
    evolution, tuning = search.EVOLUTION, search.TUNING
    first = SPREAD_POLICIES * evolution.stages[-1][0] if recipe.eta else 0
    entering = [evolution.offspring, *(survivors for _, survivors in evolution.stages)]
    seen = [*(samples for samples, _ in evolution.stages), count]
    generation = sum(policies * min(samples, count) for policies, samples in zip(entering, seen, strict=True))
    held_out = 2 * evolution.top * round(count * tuning.held_out)
    turn = held_out + BACKWARD * tuning.steps * tuning.batch_size if recipe.projector else 0
    return first + evolution.generations * generation + search.ROUNDS * turn + 2 * count


def _timed(work: Callable[[], object], model: PreTrainedModel) -> float:
    started = time.perf_counter()
    work()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started


def told(size: Disk, needed: Memory, parts: Mapping[str, float]) -> str:
    """The plan in one line."""
    shares = ", ".join(f"{name} {_duration(value)}" for name, value in parts.items())
    return (
        f"plan: up to {size.most / 1e9:.1f} GB of disk, {needed.most / 1e9:.1f} GB of memory, "
        f"about {_duration(sum(parts.values()))} ({shares})"
    )


def _duration(value: float) -> str:
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
