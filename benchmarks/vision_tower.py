"""smol's vision tower, native against torch, in turn: `python -m benchmarks.vision_tower`. Random weights, one picture.

Processor time is of all threads, and hardly depends on what else the machine does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from checkpoints.smol.tags import TAGS
from models.vision.convolution import NativeEfficientNet
from models.vision.efficientnet import EfficientNetLiteConfig, EfficientNetLiteTower, EfficientNetTower


def main(
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    repeats: Annotated[int, typer.Option(min=1, help="Turns.")] = 20,
    tags: Annotated[int, typer.Option(min=0, help="Names that the tagger says; 0: no tagger.")] = len(TAGS),
) -> None:
    torch.set_num_threads(threads)
    config = EfficientNetLiteConfig(tags=tags)
    module = EfficientNetLiteTower(config).eval().to(getattr(torch, dtype), memory_format=torch.channels_last)
    pixels = torch.randn(1, 3, config.image_size, config.image_size, dtype=module.dtype)
    natives = [NativeEfficientNet.of(part.net) for part in (module, module.tagger) if part]
    if natives[0] is None:
        raise SystemExit("the native kernels are not there: install with a C++ compiler, on a processor with AVX-512")
    towers = {"torch": EfficientNetTower(module), "native": EfficientNetTower(module, *natives)}
    found = measure(towers, pixels, repeats)
    table = Table("tower", "ms, median", "ms, fastest", "processor ms, median", "processor ms, fastest")
    for name, times in found.items():
        wall, processor = zip(*times, strict=True)
        table.add_row(name, *(f"{1000 * of(each):.1f}" for each in (wall, processor) for of in (median, min)))
    Console().print(table)


def measure(towers: Mapping[str, Callable[[Tensor], object]], pixels: Tensor, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and processor seconds of each tower, turn by turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in towers}
    for turn in track(range(repeats + 1), "turns", transient=True):
        for name, tower in towers.items():
            start, busy = time.perf_counter(), time.process_time()
            tower(pixels)
            if turn:
                found[name].append((time.perf_counter() - start, time.process_time() - busy))
    return found


if __name__ == "__main__":
    typer.run(main)
