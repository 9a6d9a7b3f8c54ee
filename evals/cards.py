"""What each level of a checkpoint does, measured and written into its manifest: `espalier eval CHECKPOINT --cards`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import fmean, mean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from evals.exam import LIMITS, RecordedAnswer, Results, Task, accuracy, ask_all, bounds, make_request
from models.checkpoint import load
from models.llava import Llava
from models.manifest import read_manifest, write_manifest
from server.engine import Engine
from server.request import Receipt

ALONE = 20
"""Questions asked one at a time, for the latency."""


def run(checkpoint: Path, new_task: Callable[[], Task], device: str, dtype: str, quiet: bool = False) -> dict[str, dict[str, Any]]:
    """Ask the same questions at every level, and store the cards. `new_task` begins the task anew."""
    console = Console(stderr=True, quiet=quiet)
    loaded = load(checkpoint, device, dtype)
    engine = Engine(loaded, LIMITS)
    answered = {level: ask_all(engine, level, new_task(), console) for level in engine.menu}
    about = new_task().about
    cards = {
        level: card(engine, results, answered["off"], _first_token(engine, level, new_task())) | about
        for level, results in answered.items()
    }
    manifest = read_manifest(loaded.directory)  # anew: others may have written it in the meantime
    write_manifest(loaded.directory, manifest.model_copy(update={"cards": cards}))
    _show(cards, loaded.name, console)
    return cards


def card(engine: Engine, results: Results, off: Results, first_token_seconds: float) -> dict[str, Any]:
    """One level's: accuracy and agreement with `off` with their 95 % Wilson intervals, arithmetic, memory and latency."""
    same = [one.receipt is not None and one.text == other.text for (_, one), (_, other) in zip(results, off, strict=True)]
    answered = [(answer, answer.receipt) for _, answer in results if answer.receipt]
    return accuracy(results) | {
        "agreement": round(fmean(same), 4), "agreement_interval": bounds(same, results),
        "flops_ratio": round(mean(receipt.flops_ratio for _, receipt in answered), 4),
        "visual_tokens": round(mean(receipt.visual_tokens for _, receipt in answered)),
        "layers": round(mean(receipt.layers for _, receipt in answered), 1),
        "kv_bytes": round(mean(_kv_bytes(engine.model, answer.prompt_tokens, receipt) for answer, receipt in answered)),
        "first_token_seconds": round(first_token_seconds, 4),
        "measured_on": f"{engine.model.device.type}, {torch.get_num_threads()} threads, batch 1",
        "token_policy": engine.token_policy,
    }  # fmt: skip


def _kv_bytes(model: Llava, prompt_tokens: int, receipt: Receipt) -> float:
    """Of the prompt: rows kept in the layers that run."""
    rows = prompt_tokens - receipt.visual_tokens_total + receipt.visual_tokens
    return rows * receipt.layers * 2 * mean(model.kv_heads) * model.head_dim * model.dtype.itemsize


def _first_token(engine: Engine, level: str, task: Task) -> float:
    """Median seconds of encoding, routing and prefill, one request at a time; pictures are new to the engine."""
    fresh = Engine(engine.checkpoint, LIMITS)
    seconds = []
    for number, (picture, item) in zip(range(min(ALONE, task.limit)), task.items, strict=False):
        answer = RecordedAnswer()
        fresh.submit(make_request(fresh.preprocessor, number, picture, item.text, level, answer))
        while not fresh.scheduler.idle:
            fresh.step()
        seconds.append(answer.first_token_s)
    return median(seconds)


def _show(cards: dict[str, dict[str, Any]], name: str, console: Console) -> None:
    table = Table("level", "accuracy", "agrees with off", "FLOPs", "visual tokens", "KV kB", "first token", title=name)
    for level, one in cards.items():
        shares = [f"{one[key]:.1%} ({100 * one[bounds][0]:.1f}–{100 * one[bounds][1]:.1f})"
                  for key, bounds in (("accuracy", "interval"), ("agreement", "agreement_interval"))]  # fmt: skip
        table.add_row(level, *shares, f"{one['flops_ratio']:.1%}", str(one["visual_tokens"]), f"{one['kv_bytes'] / 1e3:.0f}",
                      f"{one['first_token_seconds'] * 1e3:.1f} ms")  # fmt: skip
    console.print(table)
