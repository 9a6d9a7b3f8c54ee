"""Prune a shipped checkpoint in every way there is and ask each result the same questions; `make tables` shows what is stored.

`python -m evals.pruning_sweep --runs docs/runs/pruning.jsonl`: one JSON line a run, written as it ends. What is
stored already is not run again, so a sweep that was stopped goes on.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from checkpoints.shipped import resolve
from evals.exact_match import right_by_family, summary
from evals.runs import store, stored
from models.checkpoint import open_transformers
from models.manifest import read_manifest
from pruning.samples import FAMILIES, WORLD
from pruning.static.pipeline import run
from pruning.static.recipe import read

CRITERIA = ("obs", "alps", "wanda", "magnitude")
ALLOCATIONS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "ecoflap-zo": {"allocation": "ecoflap", "score": "zo"},
    "ecoflap-fo": {"allocation": "ecoflap", "score": "fo"},
    "owl": {"allocation": "owl"},
    "search, η = 0": {"allocation": "search", "eta": 0.0, "projector": False},
    "search, SRM": {"allocation": "search", "projector": False},
    "search, SRM + projector": {"allocation": "search"},
}
FIXED: dict[str, dict[str, Any]] = {
    "2:4": {"pattern": "2:4"},
    "structured 25 %": {"pattern": "structured", "sparsity": 0.25},
    "structured 50 %": {"pattern": "structured", "sparsity": 0.5},
}
SPARSITIES = (0.5, 0.6, 0.7)


def grid(families: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every setting of the table, those that matter most first: {pattern, criterion, allocation, calibrated_on, recipe}."""
    for criterion in CRITERIA:
        allocations, others = ALLOCATIONS, FIXED
        if criterion == "alps":  # it is too slow for a search, and removes no heads
            allocations, others = {"uniform": {}}, {"2:4": FIXED["2:4"]}
        for sparsity in SPARSITIES:
            for name, recipe in allocations.items():
                yield _setting(f"{sparsity:.0%} unstructured", criterion, name, {"sparsity": sparsity, **recipe})
        for pattern, fixed in others.items():
            yield _setting(pattern, criterion, "uniform", fixed)
        if criterion == "obs":
            for family in families:
                for name in ("uniform", "search, η = 0", "search, SRM"):
                    recipe = {"sparsity": 0.6, "families": (family,), **ALLOCATIONS[name]}
                    yield _setting("60% unstructured", criterion, name, recipe, family)


def _setting(pattern: str, criterion: str, allocation: str, recipe: dict[str, Any], family: str = "all") -> dict[str, Any]:
    asked = {"criterion": criterion, **recipe}
    return {"pattern": pattern, "criterion": criterion, "allocation": allocation, "calibrated_on": family, "recipe": asked}


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[k] for k in ("pattern", "criterion", "allocation", "calibrated_on", "seed"))


def main(
    runs: Annotated[Path, typer.Option(help="Where results are kept, one JSON line a run.")] = Path("docs/runs/pruning.jsonl"),
    checkpoint: Annotated[str, typer.Option(help="The dense checkpoint.")] = "embedded-dense",
    pictures: Annotated[int, typer.Option(min=1, help="Test pictures; all of their questions are asked, about nine each.")] = 440,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each setting, seeds 0 and up.")] = 3,
    only: Annotated[str, typer.Option(help="Only settings whose pattern, criterion and allocation contain this text.")] = "",
    dtype: Annotated[str, typer.Option(help="In which masks are found and questions asked: float32, or auto, as saved.")] = "auto",
) -> None:
    console = Console(stderr=True)
    data = read_manifest(resolve(checkpoint)).trained_on or WORLD
    done = {key(entry) for entry in stored(runs)}
    dense = {"pattern": "dense", "criterion": "", "allocation": "", "calibrated_on": "", "recipe": {}}
    settings = [(0, dense), *((seed, setting) for setting in grid(FAMILIES[data]) for seed in range(seeds))]
    for seed, setting in settings:
        entry: dict[str, Any] = {**setting, "seed": seed}
        text = f"{entry['pattern']}, {entry['criterion']}, {entry['allocation']}, {entry['calibrated_on']}"
        if key(entry) in done or only not in text:
            continue
        started = time.monotonic()
        entry |= _run(entry, checkpoint, pictures, data, dtype)
        entry["seconds"] = round(time.monotonic() - started, 1)
        store(runs, [entry])
        console.print(f"{text}, seed {seed}: {entry['accuracy']:.2%} in {entry['seconds']:.0f} s", highlight=False)


def _run(entry: dict[str, Any], checkpoint: str, pictures: int, data: str, dtype: str) -> dict[str, Any]:
    dense = resolve(checkpoint)
    with TemporaryDirectory() as directory:
        out = Path(directory) / "pruned"
        found: dict[str, Any] = {}
        if entry["recipe"]:
            recipe = read(None, {"data": data, **entry["recipe"], "seed": entry["seed"]})
            manifest = run(recipe, dense, out, dtype=dtype, quiet=True)
            assert manifest.pruning is not None
            found = {"projector": manifest.pruning.projector, "notes": manifest.pruning.notes}
        source = open_transformers(out if entry["recipe"] else dense, dtype=dtype)
        right = right_by_family(source.model, source.preprocessor, pictures, data=data)
        shutil.rmtree(out, ignore_errors=True)
    return summary(right) | found | {"checkpoint": source.name, "dtype": dtype, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    typer.run(main)
