"""How long a checkpoint takes to load and how much memory that needs, over reading its files: `python -m benchmarks.loading`.

Random weights at real geometry, in shards, written for this and removed afterwards. Reading and loading take turns in a process of
their own, both from the page cache, so that the disk's speed is no part of either.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from benchmarks.memory import peak_bytes
from checkpoints.embedded.build import IMAGE, build_processor
from models.checkpoint import INDEX, load, weight_bytes, weight_files
from models.random_llava import geometry_config
from models.saving import save_tensors

CHUNK = 1 << 24


def main(
    geometry: Annotated[str, typer.Option(help="tinyllava-1.1b, llava-1.5-7b or llava-1.5-13b.")] = "llava-1.5-7b",
    layers: Annotated[int | None, typer.Option(min=1, help="So many of its layers.", show_default="all")] = None,
    shard_gb: Annotated[float, typer.Option(min=0.1, help="Largest shard.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns; the fastest of each count.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="Where there is room for it.", show_default="temporary files")] = None,
) -> None:
    measure_alone(measure, repeats, geometry, layers, folder, shard_gb)


def measure_alone(
    work: Callable[[Path, int], dict[str, Any]], times: int, geometry: str, layers: int | None, folder: Path | None, shard_gb: float
) -> None:
    """Print what `work` finds out about a checkpoint with random weights, in a process of its own. It may write beside it."""
    config = geometry_config(geometry)
    config.text_config.num_hidden_layers = layers or config.text_config.num_hidden_layers
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        checkpoint = Path(directory) / "checkpoint"
        checkpoint.mkdir()
        write(checkpoint, config, round(shard_gb * 1e9))
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            found = alone.apply(work, (checkpoint, times))
    shown = {"geometry": geometry, "layers": config.text_config.num_hidden_layers, **found}
    Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(shown))


def write(directory: Path, config: LlavaConfig, shard_bytes: int) -> None:
    """A bfloat16 checkpoint with random weights; one shard is in memory at a time."""
    processor = build_processor()
    config.image_token_index, config.dtype = processor.tokenizer.convert_tokens_to_ids(IMAGE), torch.bfloat16
    config.architectures = [LlavaForConditionalGeneration.__name__]
    config.save_pretrained(directory)
    side = config.vision_config.image_size
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer=processor.tokenizer, patch_size=config.vision_config.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=IMAGE, chat_template=processor.chat_template,
    ).save_pretrained(directory)  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlavaForConditionalGeneration(config).state_dict().items()}
    places: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        held[name] = torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.02, 0.02)
        if number == len(shapes) or sum(tensor.nbytes for tensor in held.values()) >= shard_bytes:
            shard = f"model-{len(set(places.values())) + 1:05d}.safetensors"
            save_tensors(held, directory / shard)
            places |= dict.fromkeys(held, shard)
            held = {}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def measure(directory: Path, repeats: int) -> dict[str, Any]:
    """Seconds to read the files and to load them, the fastest of each, and the most memory beside what was there before."""
    cpu, size = torch.device("cpu"), weight_bytes(directory)
    before, peak, read_s, load_s = peak_bytes(lambda: None, cpu), 0, [], []
    for _ in range(repeats):
        started = time.perf_counter()
        _read(directory)
        read_s.append(time.perf_counter() - started)
        started = time.perf_counter()
        peak = max(peak, peak_bytes(lambda: load(directory), cpu) - before)
        load_s.append(time.perf_counter() - started)
    return {
        "file_bytes": size, "read_s": round(min(read_s), 2), "load_s": round(min(load_s), 2),
        "load_over_read": round(min(load_s) / min(read_s), 2), "peak_bytes": peak, "peak_over_weights": round(peak / size, 3),
    }  # fmt: skip


def _read(directory: Path) -> None:
    buffer = bytearray(CHUNK)
    for shard in weight_files(directory):
        with shard.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


if __name__ == "__main__":
    typer.run(main)
