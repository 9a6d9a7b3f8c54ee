"""Where training starts from: `python -m checkpoints.smol.start --work runs/smol`. Two minutes of one core instead of hours.

The neck's linear layer becomes Fisher's discriminants of the names of things (Fisher 1936; with a shrunken covariance, as Friedman
1989) over what the frozen network sees at each place. The projector starts as a table: each hidden unit answers to one thing's
discriminant score, and adds the language model's own embedding of that name. A few hundred steps against `Names` then sharpen it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from checkpoints import things
from checkpoints.smol.data import SIDE, VISUAL, Scenes, stack_maps
from checkpoints.smol.model import Smol
from checkpoints.smol.places import Names, Places
from checkpoints.smol.train import untrained
from models.vision.efficientnet import Maps, NeckBlock, join

TOGETHER = 64
SHRINK = 0.5
"""How much of the mean variance is added to every direction's."""
NOISE = 0.35
"""Deviation of noise on the discriminants, which have a deviation of one within a name."""
PLACE = 0.5
"""Length of where a token is, in words (top, left), beside what it shows."""


@dataclass
class Sample:
    """Places drawn from all pictures: what is seen [n, channels], the thing's number (0 is none) and the place, 0 to 288."""

    seen: Tensor
    thing: Tensor
    place: Tensor


def ellipse_labels(records: list[dict[str, Any]]) -> Tensor:
    """The thing at each place of scenes, int64 [n, 289]: inside the ellipse that fills three fifths of its box."""
    numbers = {name: i for i, name in enumerate(things.NAMES, 1)}
    middle = (torch.arange(SIDE) + 0.5) / SIDE
    labels = torch.zeros(len(records), SIDE, SIDE, dtype=torch.long)
    for label, record in zip(labels, records, strict=True):
        for left, top, right, bottom, name, *_ in record["marks"]:
            if name in numbers:
                x = (middle - (left + right) / 2) / max(0.3 * (right - left), 0.03)
                y = (middle - (top + bottom) / 2) / max(0.3 * (bottom - top), 0.03)
                label[y[:, None] ** 2 + x**2 <= 1] = numbers[name]
    return labels.flatten(1)


def pictures(work: Path) -> Iterator[tuple[Maps, Tensor]]:
    places = Places(work / "crowded")
    places.refresh()
    yield from places.all(TOGETHER)
    scenes = Scenes(work / "scenes/train")
    scenes.refresh()
    batch = []
    for part in scenes:
        batch.append(part)
        if len(batch) == TOGETHER:
            yield stack_maps([maps for maps, _ in batch]), ellipse_labels([record for _, record in batch])
            batch = []


def sample(work: Path, model: Smol, generator: torch.Generator) -> Sample:
    """Half of the places that show a thing and one in thirty of the others."""
    seen, labels, at = [], [], []
    for maps, label in pictures(work):
        flat = label.flatten()
        chosen = torch.rand(len(flat), generator=generator) < torch.where(flat > 0, 0.5, 0.03)
        seen.append(join(maps, model.head_weight.bfloat16(), model.head_bias.bfloat16()).flatten(0, 2)[chosen].bfloat16())
        labels.append(flat[chosen])
        at.append((torch.arange(len(flat)) % VISUAL)[chosen])
    return Sample(torch.cat(seen), torch.cat(labels), torch.cat(at))


def discriminants(found: Sample, classes: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Directions [channels, width] that part the names best, the mean [channels], and the names' means along them [classes, width].

    Along each direction the variance within a name is one.
    """
    channels = found.seen.shape[1]
    total, sums, counts = torch.zeros(channels, channels), torch.zeros(classes, channels), torch.zeros(classes)
    for seen, label in zip(found.seen.split(8192), found.thing.split(8192), strict=True):
        x = F.layer_norm(seen.float(), (channels,))
        total += x.T @ x
        sums.index_add_(0, label, x)
        counts += torch.bincount(label, minlength=classes)
    means = sums / counts.clamp(min=1)[:, None]
    within = (total - (means * counts[:, None]).T @ means) / counts.sum()
    values, vectors = torch.linalg.eigh(within + SHRINK * within.diagonal().mean() * torch.eye(channels))
    whiten = vectors * values.rsqrt()
    mean = sums.sum(0) / counts.sum()
    weight = (counts / counts.sum()).sqrt()
    weight[0] = 0  # what shows nothing is no name to be told from the others
    directions = torch.linalg.svd(weight[:, None] * ((means - mean) @ whiten), full_matrices=False).Vh[:width]
    directions = whiten @ directions.T
    return directions, mean, (means - mean) @ directions


@torch.no_grad()
def fill_neck(model: Smol, directions: Tensor, mean: Tensor, generator: torch.Generator) -> None:
    """The discriminants, a smooth code of row and column, and layers that change little."""
    neck = model.neck
    neck.linear.weight.copy_(directions.T)
    neck.linear.bias.copy_(-mean @ directions)
    t = torch.linspace(-1, 1, SIDE)
    code = torch.stack([t, *(wave(n * torch.pi * t) for n in (1, 2) for wave in (torch.sin, torch.cos))], dim=1)
    for position in (neck.row, neck.column):
        position.copy_(code @ torch.randn(code.shape[1], position.shape[1], generator=generator) * 0.14)
    for layer in neck.layers:
        assert isinstance(layer, NeckBlock)
        nn.init.normal_(layer.down.weight, std=0.002, generator=generator)


@torch.no_grad()
def fill_projector(model: Smol, names: Names, means: Tensor, hidden: Tensor, thing: Tensor) -> None:
    """One hidden unit a name: silent unless its score is high, then the name's embedding is added."""
    first, second = model.projector.linear_1, model.projector.linear_2
    used = len(names.words)
    offset = -0.5 * means[1:].square().sum(1)
    best = (hidden[thing > 0] @ means[1:].T + offset).amax(1)
    silent = best.quantile(0.3)
    gain = 1 / (best.quantile(0.9) - silent).clamp(min=1)
    first.weight[:used] = means[1:] * gain
    first.bias[:used] = (offset - silent) * gain
    second.weight[:, :used] = (names.words - names.center).T * 0.6
    second.bias.copy_(names.center)


def place_words(model: Smol, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Where each place is, in words: [289, width], from the mean of the words."""

    def ramp(words: tuple[str, str, str]) -> Tensor:
        ends = torch.stack([model.embedding[tokenizer(f" {w}", add_special_tokens=False).input_ids].mean(0) for w in words])
        t = torch.linspace(0, 2, SIDE)
        low = t.floor().clamp(max=1).long()
        share = (t - low)[:, None]
        return ends[low] * (1 - share) + ends[low + 1] * share - model.embedding.mean(0)

    rows, columns = ramp(("top", "middle", "bottom")), ramp(("left", "center", "right"))
    return PLACE * (rows[:, None] + columns).flatten(0, 1)


def main(
    work: Annotated[Path, typer.Option(help="Where features lie; the start goes to its state.pt.")] = Path("runs/smol"),
    steps: Annotated[int, typer.Option(help="Steps of the projector against the names.")] = 500,
    seed: Annotated[int, typer.Option(help="Which places, and the start of what is not computed.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    if (work / "state.pt").exists():
        typer.echo(f"{work / 'state.pt'} is there; remove it to start again")
        return
    model, tokenizer = untrained(work, seed)
    names = Names(list(things.NAMES), tokenizer, model.embedding)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        found = sample(work, model, generator)
        directions, mean, means = discriminants(found, len(things.NAMES) + 1, model.neck.linear.out_features)
        fill_neck(model, directions, mean, generator)
        where = (model.neck.row[:, None] + model.neck.column).flatten(0, 1)
        hidden = torch.cat([(F.layer_norm(x.float(), x.shape[1:]) - mean) @ directions for x in found.seen.split(8192)])
        fill_projector(model, names, means, hidden, found.thing)
        hidden = F.layer_norm(hidden + where[found.place], hidden.shape[1:])
    sharpen(model, names, hidden, found, place_words(model, tokenizer), steps, generator)
    torch.save({"model": model.state_dict(), "stage": 0, "step": 0, "optimizer": None}, work / "state.pt")
    (work / "start.json").write_text(json.dumps({"places": len(found.thing), "seed": seed, "steps": steps}))


def sharpen(
    model: Smol, names: Names, hidden: Tensor, found: Sample, where: Tensor, steps: int, generator: torch.Generator
) -> None:
    """The projector alone: which name, and as far as it goes the name's embedding and the place's words themselves."""
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)
    spread = (names.words - model.embedding.mean(0)).square().sum(-1).mean()
    words = torch.cat([model.embedding.mean(0, keepdim=True), names.words])
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        chosen = torch.randint(len(hidden), (1024,), generator=generator)
        thing = found.thing[chosen]
        shown = thing > 0
        tokens = model.projector(hidden[chosen] + NOISE * torch.randn(len(chosen), hidden.shape[1], generator=generator))
        loss = F.cross_entropy(names.logits(tokens[shown]), thing[shown] - 1, label_smoothing=0.1)
        off = (tokens - words[thing] - where[found.place[chosen]]).square().sum(-1).mean()
        (loss + 0.5 * off / spread).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    typer.run(main)
