"""`espalier eval --task scienceqa --data DIR` and its kin: one level or several, through the engine or a server."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from rich.console import Console

from evals import curve
from evals.exam import open_engine
from evals.official import likelihood
from evals.official.ask import Ask, server_about, server_model, through_engine, through_server
from evals.official.judge import Judge
from evals.official.likelihood import LogLikelihood, perplexity
from evals.official.own import OWN, with_dense
from evals.official.run import Document, Measured, compare, reopen, run, show, show_change
from evals.official.task import DataError, Figures, Question, Task, check_pictures, sample
from evals.official.tasks import TASKS
from evals.picture import check
from evals.runs import rewrite
from models.checkpoint import fingerprint
from pruning.dynamic.levels import layers_to_run
from pruning.dynamic.router_file import FILE
from server.engine import Engine, Limits


@dataclass(frozen=True)
class Source:
    """What answers: its name, what else makes its answers at a level another run's, how to ask at a level, and how likely an answer
    is there; a server does not tell that."""

    name: str
    about: Callable[[str], Document]
    ask: Callable[[str], Ask]
    likelihood: Callable[[str], LogLikelihood] | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be run. `task` is None for a user's own questions."""

    task: str | None
    data: Path
    levels: Sequence[str]
    split: str | None
    limit: int | None
    out: Path
    judge: Judge | None
    picture: Path | None
    quiet: bool


def engine_source(
    checkpoint: Path, levels: Sequence[str], token_policy: str | None, device: str, dtype: str, at_once: int,
    quantization: str | None = None,
) -> Source:  # fmt: skip
    """A checkpoint, loaded. Raises ValueError for a level or policy that it does not have."""
    limits = Limits(max_running=at_once, max_waiting=at_once)
    engine = open_engine(checkpoint, levels, token_policy, device, dtype, limits, quantization)
    about = {
        "fingerprint": engine.fingerprint, "token_policy": engine.token_policy, "device": engine.model.device.type,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "quantization": engine.checkpoint.quantization,
    }  # fmt: skip
    how_likely = partial(likelihood.through_engine, engine)
    return Source(
        engine.checkpoint.name, lambda level: about | _runs(engine, level), lambda level: through_engine(engine, level, at_once),
        how_likely,
    )  # fmt: skip


def _runs(engine: Engine, level: str) -> Document:
    """What a level runs of the weights: the manifest says it, and may be written anew beside the same weights."""
    asked, planner = engine.menu[level], engine.planner
    runs = [layers_to_run(engine.model.num_layers, one.skipped_layers, planner.layer_change) for one in asked.operating_points]
    return {
        "patch_ratio": asked.patch_ratio, "operating_points": [asdict(one) for one in asked.operating_points],
        "cost_weight": asked.cost_weight, "follow_up_cost_weight": asked.follow_up_cost_weight,
        "skipped_layers": [[layer for layer, run in enumerate(each) if not run] for each in runs],
        "router": fingerprint([engine.checkpoint.directory / FILE]) if asked.routed else None,
    }  # fmt: skip


def server_source(url: str, at_once: int) -> Source:
    """A running server. Raises ConnectionError where none answers."""
    model = server_model(url)
    about = server_about(url, model)
    return Source(model, lambda level: {"url": url} | about(level), lambda level: through_server(url, model, level, at_once))


def evaluate(
    plan: Plan, open_source: Callable[[], Source], against: Path | None, open_dense: Callable[[], Source] | None = None
) -> Document:
    """Run every level and print; the last line is one JSON document, which is also returned. Sources are opened once the data is
    known to be good: a large checkpoint takes minutes.

    `against` is the folder of another run to compare with; otherwise levels are compared with the first, and a user's own questions
    with the dense source at `off`, by default the same.
    """
    console = Console(stderr=True, quiet=plan.quiet)
    if plan.picture:
        check(plan.picture)
    task = TASKS[plan.task] if plan.task else OWN
    every = task.read(plan.data, plan.split)
    if not every:
        raise DataError(f"{plan.data}: no questions in it")
    questions = sample(every, plan.limit)
    check_pictures(questions)
    if plan.judge:
        task.judge_reads(plan.data)
    others = [reopen(task, against, questions)] if against else []
    source = open_source()
    data = {"data": _digest(every)}
    if plan.task is None:
        dense = open_dense() if open_dense else source
        answered = _one(replace(task, score=None), questions, plan, dense, "off", data, console)
        questions = with_dense(questions, answered.texts)
        others = [replace(answered, questions=questions, scores=[1.0] * len(questions))]
    measured = []
    for level in plan.levels:
        told = task if plan.task else _with_perplexity(task, source, level, console)
        measured.append(_one(told, questions, plan, source, level, data, console))
    others = others or measured[:1]
    changes = []
    for one in measured:
        show(one, console)
        for other in others:
            if other is not one:
                changes.append(change := compare(one, other))
                show_change(change, console)
                rewrite(_folder(plan, source, one.document["level"]) / "changes.jsonl", change.get("changed", []))
    return curve.finish([one.document for one in measured], changes, plan.picture)


def _with_perplexity(task: Task, source: Source, level: str, console: Console) -> Task:
    """A task of one's own that reports, too, how likely the dense model's answers are."""
    if source.likelihood is None:
        return task
    of_answer = source.likelihood(level)

    def figures(questions: Sequence[Question], texts: Sequence[str | None]) -> Figures:
        dense = [question.reference for question in questions]
        return task.figures(questions, texts) | {"perplexity of dense answers": perplexity(of_answer, questions, dense, console)}

    return replace(task, figures=figures)


def _one(
    task: Task, questions: list[Question], plan: Plan, source: Source, level: str, data: Document, console: Console
) -> Measured:
    about = {"task": plan.task or "own", "split": plan.split, "model": source.name, "level": level, **source.about(level), **data}
    return run(task, questions, plan.data, source.ask(level), about, _folder(plan, source, level), plan.judge, console)


def _folder(plan: Plan, source: Source, level: str) -> Path:
    folder = plan.out / plan.task if plan.task else plan.out / "own" / plan.data.stem
    return folder / f"{source.name.replace('/', '--')}@{level}"


def _digest(questions: Sequence[Question]) -> str:
    """What tells two sets of questions apart; pictures by their name, or their bytes where the data file holds them."""
    found = sha256()
    for question in questions:
        found.update(json.dumps([question.id, question.text]).encode())
        found.update(question.image if isinstance(question.image, bytes) else Path(str(question.image)).name.encode())
    return found.hexdigest()[:16]
