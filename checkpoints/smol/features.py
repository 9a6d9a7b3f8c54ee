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
from checkpoints.smol.parts import VISION, fetch, tower_network
from models.vision.efficientnet import EfficientNetLiteTower

SHARD = 64
TOGETHER = 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
def make_shard(tower: EfficientNetLiteTower, split: str, first: int, path: Path, **how: Any) -> None:
    maps, records = [], []
    for start in range(first, first + SHARD, TOGETHER):
        scenes = [things.draw(split, n, **how) for n in range(start, start + TOGETHER)]
        maps.append(tower.maps(pixels([scene.image for scene in scenes])))
        records += [record(scene) for scene in scenes]
    part = path.with_suffix(".part")
    seen = {name: torch.cat([getattr(some, name).contiguous() for some in maps]) for name in ("fine", "coarse", "wide")}
    torch.save(seen | {"records": json.dumps(records)}, part)
    part.replace(path)


def main(
    work: Annotated[Path, typer.Option(help="Shards go to its folder `scenes/<split>`.")] = Path("runs/smol"),
    split: Annotated[str, typer.Option(help="train, known, validation or test.")] = "train",
    first: Annotated[int, typer.Option(help="First scene.")] = 0,
    count: Annotated[int, typer.Option(help="How many scenes.")] = 6400,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    paraphrase: Annotated[str, typer.Option(help="seen or held_out.")] = "seen",
) -> None:
    torch.set_num_threads(threads)
    tower = tower_network(fetch(VISION, work / "parts"))
    folder = work / "scenes" / (split if paraphrase == "seen" else f"{split}-{paraphrase}")
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(first, first + count, SHARD):
        path = folder / f"{start:08d}.pt"
        if not path.exists():
            make_shard(tower, split, start, path, paraphrase=paraphrase)
            typer.echo(path)


if __name__ == "__main__":
    typer.run(main)
