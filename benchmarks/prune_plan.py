"""What `espalier prune` foretells against what it takes: `python -m benchmarks.prune_plan`.

A whole search on random weights at real geometry, made short: fewer generations, offspring and levels, no spread of the fitness.
The plan knows of these and counts what is left.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.loading import measure_alone
from benchmarks.memory import peak_bytes
from models.checkpoint import open_transformers
from models.run_state import RunState
from pruning import samples
from pruning.progress import progress_bar
from pruning.static import plan, recipe, search
from pruning.static.evolution import EvolutionConfig
from pruning.static.packing import pack
from pruning.static.pipeline import PruningRun
from pruning.static.projector import TuningConfig

SHARD_GB = 5.0


def main(
    geometry: Annotated[str, typer.Option(help="tinyllava-1.1b, llava-1.5-7b or llava-1.5-13b.")] = "tinyllava-1.1b",
    layers: Annotated[int | None, typer.Option(min=1, help="So many of its layers.", show_default="all")] = None,
    generations: Annotated[int, typer.Option(min=2, help="Generations of the search.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="Where there is room for it.", show_default="temporary files")] = None,
) -> None:
    measure_alone(measure, generations, geometry, layers, folder, SHARD_GB)


def measure(checkpoint: Path, generations: int) -> dict[str, Any]:
    """Bytes and seconds, foretold and taken. What the process held before it opened the model is no part of its memory."""
    search.LEVELS, search.TUNING = 1, TuningConfig(steps=4)
    search.EVOLUTION = EvolutionConfig(generations=generations, offspring=6)
    asked = recipe.read(None, {"allocation": "search", "samples": recipe.MIN_SEARCH_SAMPLES, "eta": 0.0, "data": samples.WORLD})
    cpu = torch.device("cpu")
    before = peak_bytes(lambda: None, cpu)
    source = open_transformers(checkpoint, "cpu", "float32")
    source.model.requires_grad_(False)
    packed = [pack(source.preprocessor, sample) for sample in samples.read(asked.data, asked.samples, asked.seed)]
    disk = plan.disk(asked, checkpoint, "float32")
    memory, parts = plan.memory(asked, source.model, packed, checkpoint).most, plan.seconds(asked, source.model, packed, disk)
    state = RunState(checkpoint.with_name("pruned"), asked.model_dump(mode="json"), source.fingerprint)
    started = time.perf_counter()
    with progress_bar(Console(stderr=True)) as progress:
        run = PruningRun(asked, source.model, packed, state, progress, checkpoint, None)
        peak = peak_bytes(run.run, cpu) - before
    took = time.perf_counter() - started
    return {
        "threads": torch.get_num_threads(),
        "foretold": {"memory_bytes": memory, "seconds": round(sum(parts.values()), 1), "parts_s": parts},
        "taken": {"memory_bytes": peak, "seconds": round(took, 1)},
        "memory_ratio": round(peak / memory, 3), "seconds_ratio": round(took / sum(parts.values()), 3),
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
