"""What the frozen network sees of scenes, kept on disk: drawing and looking cost as much as learning, and a scene is learned from
more than once. `python -m checkpoints.smol.features --split train --first 0 --count 12800 --work runs/smol`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from checkpoints import things
from checkpoints.smol import crowded
from checkpoints.smol.build import MEAN, STD
from checkpoints.smol.parts import VISION, fetch, tower_network
from models.vision.efficientnet import EfficientNetLiteTower

CROWDED = "crowded"
SHARD = 64
TOGETHER = 8


def pixels(images: list[Any], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """RGB pictures of one size to normalised [n, 3, height, width]."""
    raw = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return ((raw - mean) / std).to(dtype)


def record(scene: things.Scene) -> dict[str, Any]:
    return {
        "family": scene.family,
        "marks": [[*mark.box, mark.name, mark.kind] for mark in scene.marks],
        "questions": [[q.type, q.text, q.answer, [*q.accepted], [[*part] for part in q.parts]] for q in scene.questions],
    }


@torch.inference_mode()
def look(tower: EfficientNetLiteTower, images: list[Any]) -> dict[str, Any]:
    """The tower's maps of pictures, by name."""
    maps = [tower.maps(pixels(images[n : n + TOGETHER])) for n in range(0, len(images), TOGETHER)]
    return {name: torch.cat([getattr(some, name).contiguous() for some in maps]) for name in ("fine", "coarse", "wide")}


def make_shard(tower: EfficientNetLiteTower, split: str, first: int, path: Path, paraphrase: str) -> None:
    numbers = range(first, first + SHARD)
    if split == CROWDED:
        drawn = [crowded.draw(n) for n in numbers]
        found = look(tower, [image for image, _ in drawn])
        found["things"] = torch.from_numpy(np.stack([labels for _, labels in drawn]))
    else:
        scenes = [things.draw(split, n, paraphrase=paraphrase) for n in numbers]
        found = look(tower, [scene.image for scene in scenes])
        found["records"] = json.dumps([record(scene) for scene in scenes])
    part = path.with_suffix(".part")
    torch.save(found, part)
    part.replace(path)


def main(
    work: Annotated[Path, typer.Option(help="Shards go to its folders `crowded` and `scenes/<split>`.")] = Path("runs/smol"),
    split: Annotated[str, typer.Option(help="train, known, validation, test or crowded.")] = "train",
    first: Annotated[int, typer.Option(help="First scene.")] = 0,
    count: Annotated[int, typer.Option(help="How many scenes.")] = 6400,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    paraphrase: Annotated[str, typer.Option(help="seen or held_out.")] = "seen",
) -> None:
    torch.set_num_threads(threads)
    tower = tower_network(fetch(VISION, work / "parts"))
    folder = work / CROWDED if split == CROWDED else work / "scenes" / (split if paraphrase == "seen" else f"{split}-{paraphrase}")
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(first, first + count, SHARD):
        path = folder / f"{start:08d}.pt"
        if not path.exists():
            make_shard(tower, split, start, path, paraphrase)
            typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
