"""`espalier eval`: what was asked for, checked, and handed to the tasks that it is for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from checkpoints.shipped import resolve
from evals import cards, curve, exam, perplexity
from evals.official import command as official
from evals.official.judge import Judge
from evals.official.tasks import TASKS
from evals.tasks import open_task

ALWAYS = {"checkpoint", "task", "limit", "json"}
ENGINE = {"device", "dtype", "token_policy", "quantization"}
LEVELS = {"level", "compare", "picture"}
OWN = {"data", "against", "out", "url", "at_once"} | ENGINE | LEVELS
OFFICIAL = OWN | {"split"}
TAKES = {
    "own": OWN, "official": OFFICIAL, "judged": OFFICIAL | {"judge", "judge_model"},
    "perplexity": {"against", "device", "dtype"},
    "drawn": {"split", "family", "paraphrase", "cards"} | ENGINE | LEVELS,
}  # fmt: skip
"""The options of each kind of task, besides `ALWAYS`."""
INSTEAD = {
    "cards": (LEVELS | {"token_policy", "quantization"}, "it asks at every level of the checkpoint as it is"),
    "compare": ({"level"}, "it lists the levels"),
    "url": (ENGINE, "the server was started with its own"),
}
"""Options that leave no room for others, and why."""
NEEDS = {"judge_model": "judge"}


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


def evaluate(options: Options, given: Collection[str]) -> None:
    """Raises ValueError for options that do not go together and for whatever the task cannot use. `given` are those that are not at
    their default."""
    _check(options, given)
    if options.task in TASKS or (options.data and not options.task):
        _with_data(options)
    elif options.task == "perplexity":
        perplexity.run(resolve(options.checkpoint), options.against, options.limit, options.device, options.dtype, options.json)
    else:
        _drawn(options)


def _check(options: Options, given: Collection[str]) -> None:
    """Raises ValueError for an option that was given and would do nothing."""
    kind, who = _kind(options)
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if name not in ALWAYS | TAKES[kind]:
            raise ValueError(f"{who} has no {option}; leave it out")
        for other, (without, why) in INSTEAD.items():
            if other in given and name in without and not _for_dense(options, name):
                raise ValueError(f"--{other} has no {option}: {why}; leave one of them out")
        if name in NEEDS and NEEDS[name] not in given:
            raise ValueError(f"{option} needs --{NEEDS[name]}")


def _kind(options: Options) -> tuple[str, str]:
    """Whose options hold, and what to call it."""
    if options.task is None and options.data:
        return "own", "a run on your own questions"
    task = options.task or "scenes"
    if task in TASKS:
        return "judged" if TASKS[task].review else "official", f"the task {task}"
    return task if task in TAKES else "drawn", f"the task {task}"


def _for_dense(options: Options, name: str) -> bool:
    """Beside a server's answers those of the dense model are asked for here."""
    return name in ("device", "dtype") and options.task is None and options.against is not None


def _drawn(options: Options) -> None:
    """The tasks of `evals.tasks`."""
    given = {"split": options.split, "family": options.family, "paraphrase": options.paraphrase}
    new_task = partial(open_task, options.task or "scenes", options.limit, **given)
    where = (options.device, options.dtype, options.json)
    if options.cards:
        cards.run(resolve(options.checkpoint, write=True), new_task, *where)
    elif options.compare or options.picture:
        asked = (options.levels, options.token_policy, options.picture)
        curve.run(resolve(options.checkpoint), new_task, *asked, *where, options.quantization)
    else:
        exam.run(resolve(options.checkpoint), new_task(), options.level, options.token_policy, *where, options.quantization)


def _with_data(options: Options) -> None:
    """Tasks in official formats, and a user's own questions."""
    if not options.data:
        raise ValueError(f"the task {options.task} needs --data, the folder of its official files; docs/evaluation.md lists them")
    judge = Judge(options.judge, options.judge_model) if options.judge else None
    plan = official.Plan(
        options.task, options.data, options.levels, options.split, options.limit, options.out, judge, options.picture, options.json
    )
    if options.task is None and options.levels == ["off"] and not options.against:
        raise ValueError("your own questions are compared with the dense model: name a --level, or the dense checkpoint --against")
    if options.url:
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
