"""The search as a whole: database, then evolution and projector tuning in turns; each part is kept on disk when it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import PreTrainedModel

from models.checkpoint import weight_bytes
from models.run_state import RunState
from pruning.static.allocation import Allocation, uniform
from pruning.static.blocks import blocks, linears
from pruning.static.compressed import compressed_bytes
from pruning.static.criteria import CRITERIA
from pruning.static.database import Database, Policy, PolicyLoader, build, level_grid
from pruning.static.evaluate import Evaluator, LocalEvaluator, RayEvaluator
from pruning.static.evolution import Evolution, EvolutionConfig, EvolutionState
from pruning.static.fitness import Divergence, StructuralRisk
from pruning.static.projector import TuningConfig, tune
from pruning.static.recipe import Recipe

LEVELS = 4
"""On either side of the target, at most."""
COPIES, SMALL = 3, 4e9
"""A run keeps to so many copies of the checkpoint on disk, with fewer levels if need be; all levels are made where they take no
more than SMALL bytes."""
ROUNDS = 2
"""Turns of evolution and projector tuning, evenly spread over the generations."""
EVOLUTION, TUNING = EvolutionConfig(), TuningConfig()


def levels(weights: int, density: float, itemsize: int, checkpoint: int) -> int:
    """On either side of the target, for so many weights of `itemsize` bytes in a checkpoint of so many bytes."""
    entry = compressed_bytes(weights, density, itemsize)
    beside = max(entry, checkpoint)  # the finished blocks, or the result if the database's weights are kept
    room = max(SMALL, COPIES * checkpoint - beside)
    return max(1, min(LEVELS, int(room / entry - 1) // 2))


def open_database(recipe: Recipe, model: PreTrainedModel, checkpoint: Path, run_state: RunState) -> Database:
    """The run's database, whether it is built or not."""
    sizes = {name: linear.weight.numel() for name, linear in linears(model).items()}
    level_0 = uniform(sizes, recipe.sparsity)
    most = levels(sum(sizes.values()), 1 - recipe.sparsity, model.dtype.itemsize, weight_bytes(checkpoint))
    return Database(run_state.directory / "database", checkpoint, level_0, *level_grid(sizes, level_0, most))


@dataclass(frozen=True)
class SearchResult:
    """The best policy and its nonzeros by matrix, the entry of each generation, each tuning of the projector, and the dampings that
    the database needed."""

    policy: Policy
    allocation: Allocation
    history: list[dict[str, float]]
    projector: list[dict[str, Any]]
    damping: dict[str, float]


def search(
    recipe: Recipe, divergence: Divergence, database: Database, run_state: RunState, progress: Progress, checkpoint: Path,
    ray: str | None,
) -> SearchResult:  # fmt: skip
    """Find how many weights each matrix keeps. The model is dense again at the end, but for its projector.

    `checkpoint` is where a cluster's workers find the model.
    """
    model, samples = divergence.model, [reference.sample for reference in divergence.references]
    task = progress.add_task("database", total=len(blocks(model)))
    damping = build(database, model, samples, CRITERIA[recipe.criterion], lambda: progress.advance(task))

    loader = PolicyLoader(linears(model), database)
    local = LocalEvaluator(divergence, loader)
    shared = (checkpoint.resolve(), divergence.references, database, model.dtype)
    evaluate: Evaluator = RayEvaluator(ray, *shared) if ray else local
    limits = [database.limits[name] for name in database.names]
    config = replace(EVOLUTION, eta=recipe.eta)
    evolution = Evolution(limits, len(samples), config, recipe.seed, evaluate, StructuralRisk(database))
    state, tunings = _restore(run_state, [local, evaluate]) or (evolution.start(), [])
    task = progress.add_task("generations", total=config.generations, completed=state.generation)
    for turn in range(ROUNDS):
        while state.generation < config.generations * (turn + 1) // ROUNDS:
            state = evolution.step(state)
            run_state.write("search", {"state": state.document(), "tunings": len(tunings)})
            progress.update(task, advance=1, description=f"generations, divergence {state.history[-1]['divergence']:.4f}")
        if recipe.projector and len(tunings) <= turn:
            tuning = tune(divergence, loader, [policy for _, policy in state.best], TUNING, recipe.seed, turn)
            tunings = [*tunings, {"generation": state.generation, **asdict(tuning), "accepted": tuning.accepted}]
            projector = model.model.multi_modal_projector.state_dict()
            run_state.write_tensors("projector", projector, {"tunings": tunings})
            evaluate.set_projector(projector)
            state.best = []  # their fitness was measured with the projector before
    evaluate.close()
    loader.load(None)
    return SearchResult(state.parent, database.allocation(state.parent), state.history, tunings, damping)


def _restore(run_state: RunState, evaluators: Sequence[Evaluator]) -> tuple[EvolutionState, list[dict[str, Any]]] | None:
    """Where a stopped search was, with its projector in use; None if it had not begun."""
    if not (stored := run_state.read("search")):
        return None
    state, tunings = EvolutionState.of(stored["state"]), []
    if latest := run_state.read_tensors("projector"):
        for evaluator in evaluators:
            evaluator.set_projector(latest[0])
        tunings = latest[1]["tunings"]
        if len(tunings) > stored["tunings"]:
            state.best = []
    return state, tunings


@torch.no_grad()
def compare(divergence: Divergence, database: Database, policy: Policy) -> dict[str, float]:
    """The mean divergence over all samples of the weights that the model has, pruned in sequence, and of the policy's from the
    database, which it has afterwards."""
    everything = range(len(divergence.references))
    sequential = float(divergence(everything).mean())
    PolicyLoader(linears(divergence.model), database).load(policy)
    return {"sequential": sequential, "database": float(divergence(everything).mean())}
