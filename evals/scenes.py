"""The embedded world's exam: one question to each held-out picture, families in turn, exact match."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from checkpoints.world import Question, Scene, draw
from evals.statistics import wilson
from models.checkpoint import load
from models.preprocess import Preprocessor
from pruning.dynamic.token_policy import TokenPolicy
from server.engine import Engine, Limits
from server.request import Delta, Event, Failed, Finished, PreparedImage, Receipt, Request, Sampling

MAX_TOKENS = 160  # the longest description takes about a hundred
LIMITS = Limits(max_running=16, max_waiting=64)


def exam(split: str, limit: int, seed: int = 0) -> Iterator[tuple[Scene, Question]]:
    """`limit` pictures of a split, each with one of its questions, every type of its family equally likely."""
    for index in range(limit):
        scene = draw(split, index)
        yield scene, Random(f"{split}/{seed}/{index}").choice(scene.questions)


def normalise(answer: str) -> str:
    """What exact match compares: no case, no outer space, no final period."""
    return answer.strip().rstrip(". \n").lower()


class RecordedAnswer:
    """Collects one request's events."""

    def __init__(self) -> None:
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


def make_request(
    preprocessor: Preprocessor, number: int, scene: Scene, question: Question, level: str, answer: RecordedAnswer
) -> Request:
    image = PreparedImage(preprocessor.pixels(scene.image), sha256(scene.image.tobytes()).hexdigest())
    return Request(
        f"exam-{number}", preprocessor.question(question.text), [image], level, Sampling(max_tokens=MAX_TOKENS), answer
    )


def run(
    checkpoint: Path, level: str, limit: int, split: str, token_policy: str | None, device: str, dtype: str, quiet: bool
) -> dict[str, Any]:
    """Evaluate and print; the last line is one JSON document, which is also returned."""
    console = Console(stderr=True, quiet=quiet)
    loaded = load(checkpoint, device, dtype)
    if token_policy not in (None, *get_args(TokenPolicy)):
        raise ValueError(f"token policy {token_policy!r} is not one of {', '.join(get_args(TokenPolicy))}")
    engine = Engine(loaded, LIMITS, token_policy=token_policy)  # type: ignore[arg-type]
    if level not in engine.menu:
        raise ValueError(f"level {level!r} is not one of {', '.join(engine.menu)}")
    started = time.monotonic()
    results = ask_all(engine, level, limit, split, console)
    document = summarise(results, level, split, engine.token_policy) | {
        "checkpoint": loaded.name, "fingerprint": loaded.fingerprint, "seconds": round(time.monotonic() - started, 1)
    }  # fmt: skip
    _show(document, results, console)
    Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(document))
    return document


def ask_all(engine: Engine, level: str, limit: int, split: str, console: Console) -> list[tuple[Scene, Question, RecordedAnswer]]:
    """An exam at one level, in batches, with a progress bar."""
    results: list[tuple[Scene, Question, RecordedAnswer]] = []
    with Progress(console=console) as progress:
        task = progress.add_task(f"{limit} questions at {level}", total=limit)
        for number, (scene, question) in enumerate(exam(split, limit)):
            answer = RecordedAnswer()
            engine.submit(make_request(engine.preprocessor, number, scene, question, level, answer))
            results.append((scene, question, answer))
            while len(engine.scheduler.waiting) >= 16:
                engine.step()
            progress.update(task, completed=number + 1 - len(engine.scheduler.waiting))
        while not engine.scheduler.idle:
            engine.step()
        progress.update(task, completed=limit)
    return results


def summarise(results: list[tuple[Scene, Question, RecordedAnswer]], level: str, split: str, policy: str) -> dict[str, Any]:
    right = [normalise(answer.text) == normalise(question.answer) for _, question, answer in results]
    families: dict[str, list[bool]] = defaultdict(list)
    types: dict[str, list[bool]] = defaultdict(list)
    for (scene, question, _), ok in zip(results, right, strict=True):
        families[scene.family].append(ok)
        types[f"{scene.family}/{question.type}"].append(ok)
    receipts = [answer.receipt for _, _, answer in results if answer.receipt]

    def mean(name: str) -> float:
        return round(sum(getattr(r, name) for r in receipts) / max(1, len(receipts)), 4)

    return {
        "task": "scenes",
        "split": split,
        "accuracy": round(sum(right) / len(right), 4),
        "interval": wilson(sum(right), len(right)),
        "n": len(right),
        "failed": len(results) - len(receipts),
        "families": {name: round(sum(v) / len(v), 4) for name, v in sorted(families.items())},
        "types": {name: {"accuracy": round(sum(v) / len(v), 4), "n": len(v)} for name, v in sorted(types.items())},
        "level": level,
        "token_policy": policy,
        "visual_tokens": mean("visual_tokens"),
        "layers": mean("layers"),
        "flops_ratio": mean("flops_ratio"),
    }


def _show(document: dict[str, Any], results: list[tuple[Scene, Question, RecordedAnswer]], console: Console) -> None:
    table = Table("question", "n", "right", title=f"{document['checkpoint']} at level {document['level']}")
    for name, cell in document["types"].items():
        table.add_row(name, str(cell["n"]), f"{cell['accuracy']:.1%}")
    table.add_section()
    low, high = document["interval"]
    table.add_row("all", str(document["n"]), f"{document['accuracy']:.1%} ({low:.1%} to {high:.1%})")
    console.print(table)
    wrong = [(s, q, a) for s, q, a in results if normalise(a.text) != normalise(q.answer)]
    for scene, question, answer in wrong[:5]:
        console.print(f"  {scene.family}: {question.text} — {question.answer!r}, not {answer.text!r}", highlight=False)
