"""`espalier eval`: what was asked for, checked, and handed to the tasks that it is for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoints.shipped import resolve
from evals import cards, curve, exam, perplexity
from evals.official import command as official
from evals.official.judge import Judge
from evals.official.tasks import TASKS
from evals.tasks import open_task

WITH_DATA = ("url", "judge")
"""Options of runs on data files alone."""


@dataclass(frozen=True)
class Options:
    """The command's options by their names."""

    checkpoint: str
    task: str | None
    level: str
    data: Path | None
    limit: int | None
    split: str | None
    family: str | None
    paraphrase: str | None
    against: Path | None
    compare: str | None
    picture: Path | None
    out: Path
    url: str | None
    judge: str | None
    judge_model: str
    at_once: int
    token_policy: str | None
    device: str
    dtype: str
    quantization: str | None
    json: bool
    cards: bool

    @property
    def levels(self) -> list[str]:
        """Those to run, in order."""
        return [name.strip() for name in self.compare.split(",")] if self.compare else [self.level]


def evaluate(options: Options) -> None:
    """Raises ValueError for options that do not go together and for whatever the task cannot use."""
    if options.task in TASKS or (options.data and not options.task):
        _with_data(options)
    elif options.task == "perplexity":
        _refuse(options, "split", "family", "paraphrase", "data", "compare", "picture", "cards", "quantization", *WITH_DATA)
        perplexity.run(resolve(options.checkpoint), options.against, options.limit, options.device, options.dtype, options.json)
    else:
        _drawn(options)


def _refuse(options: Options, *names: str) -> None:
    """Raises ValueError for an option that was given and that the task does not have."""
    task = f"the task {options.task or 'scenes'}" if options.task or not options.data else "a run on your own questions"
    for name in names:
        if getattr(options, name):
            raise ValueError(f"{task} has no --{name.replace('_', '-')}")


def _drawn(options: Options) -> None:
    """The tasks of `evals.tasks`."""
    _refuse(options, "against", "data", *WITH_DATA)
    given = {"split": options.split, "family": options.family, "paraphrase": options.paraphrase}
    new_task = partial(open_task, options.task or "scenes", options.limit, **given)
    where = (options.device, options.dtype, options.json)
    if options.cards:
        _refuse(options, "compare", "picture", "quantization")  # cards hold for the checkpoint as it is
        cards.run(resolve(options.checkpoint, write=True), new_task, *where)
    elif options.compare or options.picture:
        asked = (options.levels, options.token_policy, options.picture)
        curve.run(resolve(options.checkpoint), new_task, *asked, *where, options.quantization)
    else:
        exam.run(resolve(options.checkpoint), new_task(), options.level, options.token_policy, *where, options.quantization)


def _with_data(options: Options) -> None:
    """Tasks in official formats, and a user's own questions."""
    _refuse(options, "family", "paraphrase", "cards")
    if not options.data:
        raise ValueError(f"the task {options.task} needs --data, the folder of its official files; docs/evaluation.md lists them")
    if options.judge and (options.task is None or TASKS[options.task].review is None):
        _refuse(options, "judge")
    judge = Judge(options.judge, options.judge_model) if options.judge else None
    plan = official.Plan(
        options.task, options.data, options.levels, options.split, options.limit, options.out, judge, options.picture, options.json
    )
    if options.task is None and options.levels == ["off"] and not options.against:
        raise ValueError("your own questions are compared with the dense model: name a --level, or the dense checkpoint --against")
    if options.url:
        _refuse(options, "token_policy", "quantization")
        source: Callable[[], official.Source] = partial(official.server_source, options.url, options.at_once)
    else:
        source = _engine(options, resolve(options.checkpoint), options.levels, options.quantization)
    dense = _engine(options, resolve(str(options.against)), ["off"]) if options.against and not options.task else None
    official.evaluate(plan, source, options.against if options.task else None, dense)


def _engine(
    options: Options, checkpoint: Path, levels: list[str], quantization: str | None = None
) -> Callable[[], official.Source]:
    where = (options.token_policy, options.device, options.dtype, options.at_once)
    return partial(official.engine_source, checkpoint, levels, *where, quantization)
