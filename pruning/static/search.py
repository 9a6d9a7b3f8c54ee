"""The search carried out: database, evolution and projector in turns, each part kept on disk as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from models.run_state import RunState
from pruning.static.allocation import Kept, uniform
from pruning.static.blocks import blocks, linears
from pruning.static.criteria import Criterion
from pruning.static.data import Sample
from pruning.static.database import Database, Installed, build, plan
from pruning.static.evaluate import Cluster, Evaluator, Local
from pruning.static.evolution import Plan, Search, State
from pruning.static.fitness import Proxy, Risk
from pruning.static.projector import Tuning, tune
from pruning.static.recipe import Recipe

TOWER = "language"


@dataclass
class Found:
    """The best policy. The model is dense again but for its projector.

    Once its blocks are pruned anew to `kept`, each on what the pruned ones before it put out, `finish` puts the database's entries
    back if those are closer to dense on the proxy samples.
    """

    kept: Kept
    history: list[dict[str, float]]
    projector: list[dict[str, Any]]
    finish: Callable[[], Choice]


@dataclass
class Choice:
    """The divergence of both, and the dampings of the database where its entries were put back."""

    divergence: dict[str, float]
    damping: dict[str, float] | None


def search(
    recipe: Recipe, proxy: Proxy, samples: Sequence[Sample], work: RunState, progress: Progress, method: Criterion,
    checkpoint: Path, ray: str | None,
) -> Found:  # fmt: skip
    """Find how many weights each matrix of the language model keeps; `checkpoint` is where a cluster's workers find the model."""
    model = proxy.model
    matrices = linears(model, [TOWER])
    sizes = {name: linear.weight.numel() for name, linear in matrices.items()}
    middle = uniform(sizes, recipe.sparsity)
    database = Database(work.directory / "database", middle, *plan(sizes, middle, recipe.levels))
    task = progress.add_task("database", total=len(blocks(model, TOWER)))
    damping = build(database, model, TOWER, samples, recipe.visual_weight, method, recipe.parsed, lambda: progress.advance(task))

    installed = Installed(matrices, database)
    local = Local(proxy, installed)
    evaluate: Evaluator = Cluster(ray, str(checkpoint.resolve()), proxy.references, database) if ray else local
    limits = [database.limits[name] for name in database.names]
    schedule = Plan(generations=recipe.generations, offspring=recipe.offspring, eta=recipe.eta)
    engine = Search(limits, len(samples), schedule, recipe.seed, evaluate, Risk(database))
    state, tuned = _restore(work, [local, evaluate]) or (engine.start(), [])
    task = progress.add_task("generations", total=recipe.generations, completed=state.generation)
    for turn in range(recipe.rounds):
        while state.generation < recipe.generations * (turn + 1) // recipe.rounds:
            state = engine.advance(state)
            work.write("search", {"state": state.document(), "tuned": len(tuned)})
            progress.update(task, advance=1, description=f"generations, divergence {state.history[-1]['divergence']:.4f}")
        if recipe.projector and len(tuned) <= turn:
            outcome = tune(proxy, installed, [policy for _, policy in state.best], Tuning(), recipe.seed, turn)
            tuned = [*tuned, {"generation": state.generation, **asdict(outcome), "accepted": outcome.accepted}]
            projector = model.model.multi_modal_projector.state_dict()
            work.write_tensors("projector", projector, {"tuned": tuned})
            evaluate.use(projector)
            state.best = []  # what policies are worth has changed

    evaluate.close()

    def finish() -> Choice:
        remade = {name: linear.weight.clone() for name, linear in matrices.items()}
        everything = range(len(samples))
        with torch.no_grad():
            anew = float(proxy.divergences(everything).mean())
            (stitched,) = Local(proxy, Installed(matrices, database))([state.parent], everything)
            if anew <= stitched:
                for name, linear in matrices.items():
                    linear.weight.copy_(remade[name])
        divergence = {"made anew": anew, "from the database": stitched}
        return Choice(divergence, None if anew <= stitched else damping)

    installed.install(None)
    return Found(database.kept(state.parent), state.history, tuned, finish)


def _restore(work: RunState, evaluators: Sequence[Evaluator]) -> tuple[State, list[dict[str, Any]]] | None:
    """Where a stopped search was, with its projector in use; None if it had not begun."""
    if not (stored := work.read("search")):
        return None
    state, tuned = State.of(stored["state"]), []
    if latest := work.read_tensors("projector"):
        for evaluator in evaluators:
            evaluator.use(latest[0])
        tuned = latest[1]["tuned"]
        if len(tuned) > stored["tuned"]:
            state.best = []
    return state, tuned
