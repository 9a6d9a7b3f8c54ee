"""Train what `smol` adds to its pretrained parts: `python -m checkpoints.smol.train --work runs/smol`.

Everything runs in float32: on the CPUs that this was trained on, bf16 products took 1.7 times as long. Seeded; killed at any point,
it goes on from the last save.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from checkpoints import things
from checkpoints.smol.build import TRAINED, load_trained
from checkpoints.smol.data import IGNORE, Packer, Part, Scenes, conversation, keep, stack_maps
from checkpoints.smol.model import Smol
from checkpoints.smol.parts import LANGUAGE, VISION, fetch, language_tokenizer, language_weights, vision_weights
from checkpoints.smol.places import Names, Places
from models.saving import save_tensors

SAVE_EVERY_S = 150
EVALUATE_EVERY_S = 1200
LOG_EVERY_S = 60
CROWDED = 4
"""Pictures a step whose places are named."""
TEXT = 3.0
"""Weight of staying the language model that it was."""
NAMING = 0.5
"""Weight of that loss."""


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    pictures: int
    kept: int
    rows: int
    lr: float
    text_every: int = 6
    families: tuple[str, ...] = ()  # all of them


STAGES = (
    Stage("names", 300, 2, 24, 168, 1e-3, families=("one",)),
    Stage("questions", 6000, 2, 32, 240, 8e-4),
    Stage("all", 600, 1, 289, 480, 3e-4),
)


def stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in ("ids", "positions", "segments", "labels")}


def warm_and_decay(step: int, steps: int) -> float:
    """Share of the full learning rate: 30 steps up, level, and over the last two fifths a cosine down to a tenth."""
    late = max(0.0, (step / steps - 0.6) / 0.4)
    return min(1.0, (step + 1) / 30) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * late)))


def untrained(work: Path, seed: int) -> tuple[Smol, PreTrainedTokenizerBase]:
    gguf = fetch(LANGUAGE, work / "parts")
    weights = {name: tensor.float() for name, tensor in language_weights(gguf).items()}
    vision = vision_weights(fetch(VISION, work / "parts"))
    torch.manual_seed(seed)
    return Smol(weights, (vision["head.weight"], vision["head.bias"])), language_tokenizer(gguf)


def load(work: Path) -> tuple[Smol, PreTrainedTokenizerBase, str]:
    """The model as it was last saved, its tokenizer, and how far it is."""
    model, tokenizer = untrained(work, 0)
    saved = torch.load(work / "state.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    return model.eval(), tokenizer, f"stage {saved['stage']}, step {saved['step']}"


class Trainer:
    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self.model, self.tokenizer = untrained(work, seed)
        self.scenes, self.validation = Scenes(work / "scenes/train"), Scenes(work / "scenes/validation")
        self.places = Places(work / "crowded")
        self.names = Names(list(things.NAMES), self.tokenizer, self.model.embedding)
        self.stage, self.step, self.optimizer_state = 0, 0, None
        texts = work / "texts.pt"
        self.texts = torch.load(texts, weights_only=True) if texts.exists() else []
        self._restore()
        for layer in self.model.layers:
            layer.compile(dynamic=False)

    def _restore(self) -> None:
        state = self.work / "state.pt"
        if state.exists():
            saved = torch.load(state, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.stage, self.step, self.optimizer_state = saved["stage"], saved["step"], saved["optimizer"]
        else:  # go on from what is shipped
            self.model.load_state_dict({name: weight.float() for name, weight in load_trained().items()})

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        part = self.work / "state.part"
        state = {"model": self.model.state_dict(), "stage": self.stage, "step": self.step,
                 "optimizer": optimizer.state_dict() if optimizer else None}  # fmt: skip
        torch.save(state, part)
        part.replace(self.work / "state.pt")

    def run(self) -> None:
        while self.stage < len(STAGES):
            self._run_stage(STAGES[self.stage])
            self.stage, self.step, self.optimizer_state = self.stage + 1, 0, None
            self.save(None)

    def _groups(self, lr: float) -> list[dict[str, Any]]:
        layers = list(self.model.layers.parameters())
        return [
            {"params": layers, "lr": lr, "full": lr, "weight_decay": 0.0},
            {"params": list(self.model.projector.parameters()), "lr": lr / 3, "full": lr / 3, "weight_decay": 0.01},
            {"params": list(self.model.neck.parameters()), "lr": lr / 6, "full": lr / 6, "weight_decay": 0.01},
        ]

    def _run_stage(self, stage: Stage) -> None:
        optimizer = torch.optim.AdamW(self._groups(stage.lr), betas=(0.9, 0.98))
        if self.optimizer_state:
            optimizer.load_state_dict(self.optimizer_state)
        packer = Packer(self.tokenizer, stage.rows)
        saved = evaluated = logged = time.monotonic()
        seen: dict[str, list[float]] = defaultdict(list)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task(stage.name, total=stage.steps, completed=self.step)
            while self.step < stage.steps:
                if self.step % 25 == 0 or not len(self.scenes):
                    self.scenes.refresh()
                    self.places.refresh()
                self._train_step(stage, packer, optimizer, seen)
                self.step += 1
                progress.update(task, advance=1, description=f"{stage.name} loss {seen['loss'][-1]:.3f}")
                now = time.monotonic()
                if now - logged > LOG_EVERY_S:
                    logged = now
                    means = " ".join(f"{name} {sum(values) / len(values):.3f}" for name, values in seen.items())
                    self.log(f"{stage.name} step {self.step}/{stage.steps} {means}, {len(self.scenes)} scenes")
                    seen.clear()
                if now - saved > SAVE_EVERY_S:
                    saved = now
                    self.save(optimizer)
                if now - evaluated > EVALUATE_EVERY_S:
                    evaluated = now
                    self.log(self.evaluate(stage))

    def _train_step(
        self, stage: Stage, packer: Packer, optimizer: torch.optim.Optimizer, seen: dict[str, list[float]]
    ) -> None:
        rng = Random(f"{self.seed}/{stage.name}/{self.step}")
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * warm_and_decay(self.step, stage.steps)
        loss, right = self._picture_loss(stage, packer, rng)
        loss.backward()
        naming, named = self._naming_loss(rng)
        (NAMING * naming).backward()
        seen["loss"].append(loss.item())
        seen["right"].append(right)
        seen["naming"].append(naming.item())
        seen["named"].append(named)
        if self.texts and self.step % stage.text_every == 0:
            text = self._text_loss(stage, packer, rng)
            (TEXT * text).backward()
            seen["text"].append(text.item())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def log(self, line: str) -> None:
        with (self.work / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%H:%M')} {line}\n")

    def _forward(self, parts: list[Part], rows: list[dict[str, Any]], kept: list[Any], first: int) -> Tensor:
        batch = stack(rows)
        hidden = self.model.look(stack_maps([maps for maps, _ in parts]))
        visual = self.model.visual(hidden, torch.from_numpy(np.stack(kept)))
        return self.model(batch["ids"], batch["positions"], batch["segments"], visual, first)

    def _picture_loss(self, stage: Stage, packer: Packer, rng: Random) -> tuple[Tensor, float]:
        parts = [self.scenes.sample(rng, stage.families) for _ in range(stage.pictures)]
        kept = [keep(record, stage.kept, rng) for _, record in parts]
        rows = [packer.pack(conversation(p[1], rng), k, rng) for p, k in zip(parts, kept, strict=True)]
        hidden = self._forward(parts, rows, kept, len(packer.head))
        labels = torch.from_numpy(np.stack([row["labels"] for row in rows]))[:, 1:]
        answered = labels != IGNORE
        logits, wanted = self.model.logits(hidden[:, :-1][answered]), labels[answered]
        weight = torch.from_numpy(np.stack([answer_weights(row, packer.rows) for row in rows]))[:, 1:][answered]
        loss = (F.cross_entropy(logits, wanted, reduction="none") * weight).sum() / weight.sum()
        return loss, (logits.argmax(-1) == wanted).float().mean().item()

    def _naming_loss(self, rng: Random) -> tuple[Tensor, float]:
        maps, labels = self.places.sample(rng, CROWDED)
        hidden = self.model.look(maps)
        dice = torch.rand(labels.shape, generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
        chosen = (labels > 0) & (dice < 0.3)
        logits = self.names.logits(self.model.projector(hidden[chosen]))
        loss = F.cross_entropy(logits, labels[chosen] - 1, label_smoothing=0.1)
        return loss, (logits.argmax(-1) + 1 == labels[chosen]).float().mean().item()

    def _text_loss(self, stage: Stage, packer: Packer, rng: Random) -> Tensor:
        """KL to what the language model itself foresaw for its own texts: its likeliest tokens and all the others together."""
        order = rng.sample(range(len(self.texts)), len(self.texts))
        groups = [self._texts_of(order[n :: stage.pictures], stage.rows) for n in range(stage.pictures)]
        batch = stack([packer.text([text["ids"].tolist() for text in group]) for group in groups])
        hidden = self.model(batch["ids"], batch["positions"], batch["segments"], None, 0)
        used = torch.cat([hidden[n, : sum(len(text["ids"]) for text in group)] for n, group in enumerate(groups)])
        logs = self.model.logits(used).log_softmax(-1)
        top = torch.cat([text["top"] for group in groups for text in group]).long()
        share = torch.cat([text["share"] for group in groups for text in group]).float()
        mine = logs.gather(1, top)
        rest = (1 - share.sum(1)).clamp(min=1e-6)
        mine_rest = torch.log1p(-mine.exp().sum(1).clamp(max=1 - 1e-6))
        kl = (share * (share.clamp(min=1e-9).log() - mine)).sum(1) + rest * (rest.log() - mine_rest)
        return kl.mean()

    def _texts_of(self, numbers: list[int], room: int) -> list[dict[str, Tensor]]:
        chosen = []
        for number in numbers:
            if len(self.texts[number]["ids"]) <= room:
                chosen.append(self.texts[number])
                room -= len(chosen[-1]["ids"])
        return chosen

    @torch.no_grad()
    def evaluate(self, stage: Stage, scenes: int = 40) -> str:
        """Share of a validation hand's questions whose whole answer is the likeliest at every token, by type."""
        self.validation.refresh()
        packer, rng = Packer(self.tokenizer, stage.rows, follow_up=0.0), Random(0)
        right: dict[str, list[bool]] = defaultdict(list)
        for number, part in enumerate(self.validation):
            if number >= scenes:
                break
            kept = [keep(part[1], stage.kept, rng)]
            row = packer.pack(conversation(part[1], rng), kept[0], rng)
            hidden = self._forward([part] * stage.pictures, [row] * stage.pictures, kept * stage.pictures, len(packer.head))[0]
            for said, start, end in row["taken"]:
                found = self.model.logits(hidden[start - 1 : end - 1]).argmax(-1).numpy()
                right[said.type.removesuffix("_sentence")].append(bool((found == row["labels"][start:end]).all()))
        every = [hit for hits in right.values() for hit in hits]
        types = " ".join(f"{k} {sum(v)}/{len(v)}" for k, v in sorted(right.items()))
        return f"VALIDATION hand, exact answers: {sum(every) / len(every):.3f} of {len(every)} | {types}"


def answer_weights(row: dict[str, Any], rows: int) -> np.ndarray:
    """Each answer counts as the root of its length, so that a long one does not drown the short ones."""
    weight = np.zeros(rows, np.float32)
    for _, start, end in row["taken"]:
        weight[start:end] = (end - start) ** -0.5
    return weight


def freeze(model: Smol, folder: Path = TRAINED) -> None:
    """Write what was trained, in bf16: what `build` merges, and what later training goes on from."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    save_tensors(trained, folder / "trained.safetensors")


def main(
    work: Annotated[Path, typer.Option(help="Features and states; a killed run goes on from here.")] = Path("runs/smol"),
    seed: Annotated[int, typer.Option(help="LoRA's start, the order of scenes.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    trainer = Trainer(work, seed)
    trainer.run()
    freeze(trainer.model)


if __name__ == "__main__":
    typer.run(main)
