"""CLIP-L/336 and a projector with patches merged to some shares, and without a share of heads and neurons, in turn:
`python -m benchmarks.patch_merging`. Random weights, one picture.

Processor time is of all threads, and hardly depends on what else the machine does.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.runners import cut_out
from benchmarks.vision_tower import measure
from models.llava import from_transformers
from models.random_llava import geometry_config, random_model


def main(
    ratio: Annotated[list[float] | None, typer.Option(help="Share of the patches; may repeat. All, 1/2, 1/3 and 1/4.")] = None,
    sparsity: Annotated[float, typer.Option(min=0, max=0.99, help="Also without this share of the tower's heads and neurons.")] = 0,
    geometry: Annotated[str, typer.Option(help="Whose: tinyllava-1.1b, llava-1.5-7b, smol-135m or tiny.")] = "tinyllava-1.1b",
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    repeats: Annotated[int, typer.Option(min=1, help="Turns.")] = 5,
) -> None:
    torch.set_num_threads(threads)
    config = geometry_config(geometry)
    config.text_config.num_hidden_layers = 1
    model = from_transformers(random_model(config, dtype=getattr(torch, dtype)))
    size = config.vision_config.image_size
    pixels = torch.randn(1, 3, size, size, dtype=model.dtype)
    ratios = ratio or [1.0, 1 / 2, 1 / 3, 1 / 4]
    towers = {"": model.vision} | ({f", {sparsity:.0%} gone": cut_out(model, sparsity).vision} if sparsity else {})
    with torch.inference_mode():
        runs = {f"{one:.3g}{name}": partial(tower, patch_ratio=one) for name, tower in towers.items() for one in ratios}
        found = measure(runs, pixels, repeats)
    table = Table("patches", "ms, median", "processor ms, median", "processor ms, fastest")
    for name, times in found.items():
        wall, processor = zip(*times, strict=True)
        table.add_row(name, *(f"{1000 * value:.0f}" for value in (median(wall), median(processor), min(processor))))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
