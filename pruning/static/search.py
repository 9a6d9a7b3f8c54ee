"""The search as a whole: database, then evolution and projector tuning in turns; each part is kept on disk when it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from models.run_state import RunState
from pruning.static.allocation import Allocation, uniform
from pruning.static.blocks import blocks, linears
from pruning.static.criteria import CRITERIA
from pruning.static.database import Database, Policy, PolicyLoader, build, level_grid
from pruning.static.evaluate import Evaluator, LocalEvaluator, RayEvaluator
from pruning.static.evolution import Evolution, EvolutionConfig, EvolutionState
from pruning.static.fitness import Divergence, StructuralRisk
from pruning.static.projector import TuningConfig, tune
from pruning.static.recipe import Recipe

LEVELS = 4
"""On either side of the target."""
ROUNDS = 2
"""Turns of evolution and projector tuning, evenly spread over the generations."""
EVOLUTION, TUNING = EvolutionConfig(), TuningConfig()


@dataclass(frozen=True)
class SearchResult:
    """The best policy and its nonzeros by matrix, the entry of each generation, each tuning of the projector, and the dampings that
    the database needed."""

    policy: Policy
    allocation: Allocation
    history: list[dict[str, float]]
    projector: list[dict[str, Any]]
    database: Database
    damping: dict[str, float]


def search(
    recipe: Recipe, divergence: Divergence, run_state: RunState, progress: Progress, checkpoint: Path, ray: str | None
) -> SearchResult:
    """Find how many weights each matrix keeps. The model is dense again at the end, but for its projector.

    `checkpoint` is where a cluster's workers find the model.
    """
    model, samples = divergence.model, [reference.sample for reference in divergence.references]
    matrices = linears(model)
    sizes = {name: linear.weight.numel() for name, linear in matrices.items()}
    level_0 = uniform(sizes, recipe.sparsity)
    database = Database(run_state.directory / "database", level_0, *level_grid(sizes, level_0, LEVELS))
    task = progress.add_task("database", total=len(blocks(model)))
    damping = build(database, model, samples, CRITERIA[recipe.criterion], lambda: progress.advance(task))

    loader = PolicyLoader(matrices, database)
    local = LocalEvaluator(divergence, loader)
    evaluate: Evaluator = RayEvaluator(ray, checkpoint.resolve(), divergence.references, database) if ray else local
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
    return SearchResult(state.parent, database.allocation(state.parent), state.history, tunings, database, damping)


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
def keep_closer(found: SearchResult, divergence: Divergence) -> tuple[dict[str, float], bool]:
    """Choose between the weights that the model has now, pruned in sequence to `found.allocation`, and the policy's from the
    database: the model keeps those that are closer to dense on the samples. Returns the divergence of both, and whether the latter
    are kept."""
    matrices = linears(divergence.model)
    weights = {name: linear.weight.clone() for name, linear in matrices.items()}
    everything = range(len(divergence.references))
    sequential = float(divergence(everything).mean())
    PolicyLoader(matrices, found.database).load(found.policy)
    database = float(divergence(everything).mean())
    if sequential <= database:
        for name, linear in matrices.items():
            linear.weight.copy_(weights[name])
    return {"sequential": sequential, "database": database}, not sequential <= database
