"""A task's questions put to a checkpoint: the engine answers in batches, and the right answers are counted, with 95 % intervals."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from evals.statistics import interval, wilson
from models.checkpoint import load
from models.preprocess import Preprocessor
from pruning.dynamic.token_policy import TokenPolicy
from server.engine import Engine, Limits
from server.request import Delta, Event, Failed, Finished, PreparedImage, Receipt, Request, Sampling

MAX_TOKENS = 160  # the longest description takes about a hundred
LIMITS = Limits(max_running=16, max_waiting=64)


@dataclass(frozen=True)
class Item:
    """One question: what it is about (`family`) and asks for (`type`), an answer that is right, and how any answer is judged."""

    family: str
    type: str
    text: str
    answer: str
    judge: Callable[[str], bool]


@dataclass(frozen=True)
class Task:
    """`items` yields each picture (RGB) with a question about it; `limit` is how many are asked at most; `about` is what the
    document says of them, its name above all."""

    items: Iterator[tuple[Image.Image, Item]]
    limit: int
    about: dict[str, str]


def normalise(answer: str) -> str:
    """What exact match compares: no case, no outer space, no final period."""
    return answer.strip().rstrip(". \n").lower()


def exactly(answer: str) -> Callable[[str], bool]:
    """The judge of exact match."""
    return lambda given: normalise(given) == normalise(answer)


class RecordedAnswer:
    """Collects one request's events. `picture` tells its picture from others."""

    def __init__(self) -> None:
        self.picture = ""
        self.text = ""
        self.receipt: Receipt | None = None
        self.prompt_tokens = 0
        self.first_token_s = 0.0
        self.done = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Delta):
            self.text += event.text
        if isinstance(event, Finished):
            self.receipt, self.prompt_tokens = event.receipt, event.prompt_tokens
            self.first_token_s = sum(event.timings.get(stage, 0.0) for stage in ("encode", "route", "prefill"))
        self.done = self.done or isinstance(event, (Finished, Failed))


Results = list[tuple[Item, RecordedAnswer]]


def make_request(
    preprocessor: Preprocessor, number: int, picture: Image.Image | None, text: str, level: str, answer: RecordedAnswer,
    max_tokens: int = MAX_TOKENS,
) -> Request:  # fmt: skip
    """A question about a picture, or about none."""
    if picture:
        images = [PreparedImage(preprocessor.picture(picture), sha256(picture.tobytes()).hexdigest())]
        prompt = preprocessor.question(text, layout=images[0].picture.layout)
        answer.picture = images[0].digest
    else:
        images, prompt = [], preprocessor.prompt([{"role": "user", "content": [{"type": "text", "text": text}]}])
    return Request(f"exam-{number}", prompt, images, level, Sampling(max_tokens=max_tokens), answer)


def run(
    checkpoint: Path, task: Task, level: str, token_policy: str | None, device: str, dtype: str, quiet: bool,
    quantization: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate and print; the last line is one JSON document, which is also returned."""
    console = Console(stderr=True, quiet=quiet)
    engine = open_engine(checkpoint, [level], token_policy, device, dtype, quantization=quantization)
    started = time.monotonic()
    results = ask_all(engine, level, task, console)
    document = summarise(results, task.about, level, engine.token_policy) | {
        "checkpoint": engine.checkpoint.name, "fingerprint": engine.fingerprint, "seconds": round(time.monotonic() - started, 1),
        "quantization": engine.checkpoint.quantization, "weight_bytes": engine.model.weight_bytes,
    }  # fmt: skip
    _show(document, results, console)
    Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(document))
    return document


def open_engine(
    checkpoint: Path, levels: Sequence[str], token_policy: str | None, device: str, dtype: str, limits: Limits = LIMITS,
    quantization: str | None = None,
) -> Engine:  # fmt: skip
    """A checkpoint's engine, to be stepped. Raises ValueError for a policy that there is not, or a level that it does not have."""
    if token_policy not in (None, *get_args(TokenPolicy)):
        raise ValueError(f"token policy {token_policy!r} is not one of {', '.join(get_args(TokenPolicy))}")
    loaded = load(checkpoint, device, dtype, quantization)
    engine = Engine(loaded, limits, token_policy=token_policy)  # type: ignore[arg-type]
    for level in levels:
        if level not in engine.menu:
            raise ValueError(f"level {level!r} is not one of {', '.join(engine.menu)}")
    return engine


def ask_all(engine: Engine, level: str, task: Task, console: Console) -> Results:
    """Ask a task's questions at one level, in batches, with a progress bar. No picture is kept for longer than its request."""
    results: Results = []
    with Progress(console=console) as progress:
        bar = progress.add_task(f"{task.about['task']} at {level}", total=task.limit)
        for number, (picture, item) in zip(range(task.limit), task.items, strict=False):
            answer = RecordedAnswer()
            engine.submit(make_request(engine.preprocessor, number, picture, item.text, level, answer))
            results.append((item, answer))
            while len(engine.scheduler.waiting) >= 16:
                engine.step()
            progress.update(bar, completed=number + 1 - len(engine.scheduler.waiting))
        while not engine.scheduler.idle:
            engine.step()
        progress.update(bar, completed=len(results), total=len(results))
    return results


def summarise(results: Results, about: dict[str, str], level: str, policy: str) -> dict[str, Any]:
    """Accuracy over all, by family and by type in each family."""
    families: dict[str, Results] = defaultdict(list)
    types: dict[str, Results] = defaultdict(list)
    for item, answer in results:
        families[item.family].append((item, answer))
        types[f"{item.family}/{item.type}"].append((item, answer))
    receipts = [answer.receipt for _, answer in results if answer.receipt]

    def mean(name: str) -> float:
        return round(sum(getattr(r, name) for r in receipts) / max(1, len(receipts)), 4)

    return about | accuracy(results) | {
        "failed": len(results) - len(receipts),
        "different_answers": len({item.answer for item, _ in results}),
        "families": {name: accuracy(families[name]) for name in sorted(families)},
        "types": {name: accuracy(types[name]) for name in sorted(types)},
        "level": level,
        "token_policy": policy,
        "visual_tokens": mean("visual_tokens"),
        "layers": mean("layers"),
        "flops_ratio": mean("flops_ratio"),
    }  # fmt: skip


def judged(results: Results) -> list[bool]:
    """Whether each answer is right; a request that failed is not."""
    return [answer.receipt is not None and item.judge(answer.text) for item, answer in results]


def accuracy(results: Results) -> dict[str, Any]:
    """How many are right, as a share with its interval."""
    right = judged(results)
    return {"accuracy": round(sum(right) / max(1, len(right)), 4), "interval": bounds(right, results), "n": len(right)}


def bounds(true: Sequence[bool], results: Results) -> tuple[float, float]:
    """95 % Wilson interval of the share of results for which something is true; those about one picture vary together."""
    pictures = [answer.picture or number for number, (_, answer) in enumerate(results)]
    return wilson(sum(true), len(true)) if len(set(pictures)) == len(true) else interval(true, pictures)


def _show(document: dict[str, Any], results: Results, console: Console) -> None:
    table = Table("question", "n", "right", title=f"{document['task']}: {document['checkpoint']} at level {document['level']}")
    for part in ("types", "families"):
        for name, cell in document[part].items():
            table.add_row(name, *_cells(cell))
        table.add_section()
    table.add_row("all", *_cells(document))
    console.print(table)
    for item, answer in [one for one, right in zip(results, judged(results), strict=True) if not right][:5]:
        console.print(f"  {item.family}: {item.text} — {item.answer!r}, not {answer.text!r}", highlight=False, markup=False)


def _cells(cell: dict[str, Any]) -> tuple[str, str]:
    low, high = cell["interval"]
    return str(cell["n"]), f"{cell['accuracy']:.1%} ({low:.1%} to {high:.1%})"
