"""Levels side by side: accuracy against FLOPs and against measured time, for any task."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from evals.exam import Task, ask_all, judged, open_engine, summarise
from evals.official.run import Measured, compare, show_change
from evals.official.task import Question
from evals.picture import check
from server.engine import Engine

Document = dict[str, Any]


def run(
    checkpoint: Path, new_task: Callable[[], Task], levels: Sequence[str], token_policy: str | None, picture: Path | None,
    device: str, dtype: str, quiet: bool, quantization: str | None = None,
) -> Document:  # fmt: skip
    """The same questions of a task of `evals.tasks` at several levels; `new_task` begins it anew."""
    console = Console(stderr=True, quiet=quiet)
    if picture:
        check(picture)
    engine = open_engine(checkpoint, levels, token_policy, device, dtype, quantization=quantization)
    measured = [_measure(engine, new_task(), level, console) for level in levels]
    changes = [compare(one, measured[0]) for one in measured[1:]]
    for change in changes:
        show_change(change, console)
    return finish([one.document for one in measured], changes, picture)


def _measure(engine: Engine, task: Task, level: str, console: Console) -> Measured:
    started = time.monotonic()
    results = ask_all(engine, level, task, console)
    seconds = (time.monotonic() - started) / max(1, len(results))
    document = summarise(results, task.about, level, engine.token_policy) | {
        "model": engine.checkpoint.name, "measure": "accuracy", "seconds_per_question": round(seconds, 4),
        "quantization": engine.checkpoint.quantization,
    }  # fmt: skip
    # The digest stands for a picture's bytes, which are not kept.
    questions = [Question(number, item.text, answer.picture.encode(), "") for number, (item, answer) in enumerate(results)]
    texts = [answer.text if answer.receipt else None for _, answer in results]
    return Measured(document, questions, texts, list(map(float, judged(results))))


def finish(documents: Sequence[Document], changes: Sequence[Document], picture: Path | None) -> Document:
    """Draw what is asked for and print the JSON document: of one level itself, of several all of them by name."""
    if picture:
        draw(documents, picture)
    first, *others = documents
    whole = {"task": first["task"], "levels": {one["level"]: one for one in documents}} if others else dict(first)
    if changes:
        whole["changes"] = [{name: value for name, value in change.items() if name != "changed"} for change in changes]
    Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(whole))
    return whole


AXES = (("flops_ratio", "FLOPs of the prefill, share of all"), ("seconds_per_question", "seconds a question, measured"))


def draw(documents: Sequence[Document], path: Path) -> None:
    """A panel for each axis that was measured. Raises ValueError for what was not scored."""
    from matplotlib.figure import Figure

    if unscored := [one["level"] for one in documents if "accuracy" not in one]:
        raise ValueError(f"--picture needs scores, and level {unscored[0]} has none: the data holds no answers, or needs a --judge")
    axes = [(name, label) for name, label in AXES if all(one.get(name) is not None for one in documents)]
    figure = Figure(figsize=(4.6 * len(axes), 3.8), layout="constrained")
    for panel, (name, label) in zip(figure.subplots(1, len(axes), squeeze=False, sharey=True)[0], axes, strict=True):
        for one in documents:
            low, high = one["interval"]
            x, y = one[name], one["accuracy"]
            panel.errorbar(x, y, yerr=[[max(0.0, y - low)], [max(0.0, high - y)]], fmt="o", capsize=3, label=one["level"])
        panel.set_xlabel(label)
        panel.set_xlim(0, 1.08 * max(one[name] for one in documents))
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel(documents[0]["measure"])
    figure.axes[-1].legend(title="level")
    figure.suptitle(f"{documents[0]['task']}, {documents[0]['model']}, {documents[0]['n']} questions, 95 % intervals")
    figure.savefig(path, dpi=150)
