"""Measure a checkpoint's layers on pictures of the embedded world and store the result in its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from evals.scenes import exam
from models.checkpoint import Checkpoint, load, resolve
from models.manifest import MANIFEST, Calibration, write_manifest
from pruning.dynamic.layer_importance import layer_change


def samples(checkpoint: Checkpoint, count: int, seed: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Prompts and pixels of `count` validation pictures."""
    for scene, question in exam("validation", count, seed):
        yield checkpoint.preprocessor.question(question.text), checkpoint.preprocessor.pixels(scene.image)[None]


def calibrate(checkpoint: Checkpoint, count: int, seed: int) -> Calibration:
    shown = track(samples(checkpoint, count, seed), "calibrating", count, console=Console(stderr=True))
    change = layer_change(checkpoint.model, shown)
    return Calibration(layer_change=change, data="embedded world, validation", samples=count, seed=seed)


def store(directory: str | Path, count: int, seed: int, device: str, dtype: str) -> Calibration:
    """Calibrate a checkpoint and write the result into its manifest."""
    checkpoint = load(directory, device, dtype)
    calibration = calibrate(checkpoint, count, seed)
    write_manifest(checkpoint.directory, checkpoint.manifest.model_copy(update={"calibration": calibration}))
    return calibration


def run(name: str, count: int, seed: int, device: str, dtype: str) -> None:
    calibration = store(name, count, seed, device, dtype)
    console = Console()
    for layer, change in enumerate(calibration.layer_change):
        console.print(f"layer {layer:2d}  {change:.4f}  {'#' * round(change * 60)}", highlight=False)
    console.print(f"stored in {resolve(name) / MANIFEST}", highlight=False)
