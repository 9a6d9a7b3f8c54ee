"""Train the embedded checkpoint: `python -m checkpoints.embedded.train --work runs/embedded --out OUT`.

Six stages, since what is asked matters more than for how long:

1. The vision tower alone, on patch labels.
2. Captions of every family of pictures, which teach which color belongs to which shape.
3. Questions, captions and drills (see `checkpoints.world.Drill`) together.
4. The same with all visual tokens and the tower unfrozen. Until here, visual tokens are pooled two by two.
5. and 6. The same with more boards and more counting.

A few attention heads are also trained to attend to what a word names (`grounding.py`). Training is seeded; a run that was killed
goes on from its last save.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlavaForConditionalGeneration

from checkpoints.embedded.build import MEAN, STD, build_config, build_model, build_tokenizer, export
from checkpoints.embedded.data import COLOR_CLASSES, DETAIL_CLASSES, GRID, IGNORE, WHAT_CLASSES, Batches, Mix, Packer
from checkpoints.embedded.grounding import WordClasses, grounding_loss

SAVE_EVERY_S = 120
GROUNDING_WEIGHT = 0.3
"""Of the grounding loss beside the loss of the answers."""


@dataclass(frozen=True)
class Stage:
    name: str
    steps: int
    batch: int
    lr: float
    mix: Mix | None = None
    pool: int = 1
    train_tower: bool = False
    families: tuple[int, ...] = (1, 1, 1, 1)  # shapes, signs, charts, grids


STAGES = (
    Stage("tower", 3000, 32, 1e-3, train_tower=True, families=(4, 5, 1, 1)),
    Stage("captions", 1500, 32, 1e-3, Mix(length=176, long=2), pool=2, families=(4, 3, 1, 1)),
    Stage("questions", 2600, 24, 1e-3, Mix(length=256, long=1, drills=3, follow_up=0.2), pool=2, families=(4, 2, 2, 2)),
    Stage("full", 1400, 24, 5e-4, Mix(length=352, long=1, drills=2, follow_up=0.3), train_tower=True, families=(4, 2, 2, 2)),
    Stage("boards", 600, 24, 4e-4, Mix(length=352, long=1, drills=2, follow_up=0.3), train_tower=True, families=(4, 2, 1, 4)),
    Stage("counts", 700, 24, 4e-4, Mix(length=352, long=1, drills=3, follow_up=0.2), train_tower=True, families=(3, 1, 1, 5)),
)


class TowerHeads(nn.Module):
    """Classify each patch's thing, color and detail from the tower's output, and the set of things from its class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, WHAT_CLASSES + COLOR_CLASSES + DETAIL_CLASSES)
        self.scene = nn.Linear(width, WHAT_CLASSES * COLOR_CLASSES)

    def loss(self, hidden: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        """Mean loss, and the share of non-empty patches whose three classes are all right. `hidden` is [B, 1 + patches, width]."""
        logits = self.patch(hidden[:, 1:]).split([WHAT_CLASSES, COLOR_CLASSES, DETAIL_CLASSES], dim=-1)
        labels = batch["patches"].flatten(2)
        filled = labels[:, 0] > 0
        # Most patches are empty; they count a fifth, so that small things are learned.
        weight = torch.where(filled, 1.0, 0.2)
        loss = sum(
            (F.cross_entropy(part.transpose(1, 2).float(), labels[:, i], reduction="none") * weight).mean()
            for i, part in enumerate(logits)
        )
        scene = F.binary_cross_entropy_with_logits(self.scene(hidden[:, 0]).float(), batch["presence"], reduction="sum")
        right = torch.stack([part.argmax(-1) == labels[:, i] for i, part in enumerate(logits)]).all(0)
        return loss + 0.02 * scene / len(hidden), right[filled].float().mean().item()


def tower_hidden(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    normal = (pixels / 255.0 - mean) / std
    return model.model.vision_tower(normal).last_hidden_state


def language_loss(
    model: LlavaForConditionalGeneration, batch: dict[str, Tensor], stage: Stage, first_visual: int, words: WordClasses
) -> tuple[Tensor, Tensor, float]:
    """Cross entropy on the answers, the grounding loss, and the share of answer tokens that are right."""
    with torch.set_grad_enabled(stage.train_tower):
        hidden = tower_hidden(model, batch["pixels"])
    features = model.model.multi_modal_projector(hidden[:, 1:])
    if stage.pool > 1:
        square = features.transpose(1, 2).unflatten(2, (GRID, GRID))
        features = F.avg_pool2d(square, stage.pool).flatten(2).transpose(1, 2)
    ids, segments = batch["ids"], batch["segments"]
    embeds = model.get_input_embeddings()(ids)
    visual = slice(first_visual, first_visual + features.shape[1])
    embeds = torch.cat([embeds[:, : visual.start], features.to(embeds.dtype), embeds[:, visual.stop :]], dim=1)
    order = torch.arange(ids.shape[1], device=ids.device)
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    visible = (same & (order[:, None] >= order[None, :]))[:, None]
    mask = torch.where(visible, 0.0, -1e4).to(torch.bfloat16)
    text = model.model.language_model
    rope = text.rotary_emb(embeds, batch["positions"])
    states = [embeds]
    for layer in text.layers:
        states.append(layer(states[-1], attention_mask=mask, position_ids=batch["positions"], position_embeddings=rope))
    labels = batch["labels"][:, 1:]
    answered = labels != IGNORE
    logits = model.lm_head(text.norm(states[-1])[:, :-1][answered]).float()
    wanted = labels[answered]
    grounding = grounding_loss(text, states, batch, words, mask, rope, visual, stage.pool)
    return F.cross_entropy(logits, wanted), grounding, (logits.argmax(-1) == wanted).float().mean().item()


def learning_rate(step: int, stage: Stage) -> float:
    warm = min(1.0, (step + 1) / 100)
    return stage.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / stage.steps)))


class Trainer:
    def __init__(
        self, work: Path, seed: int, device: str, scale: float, init: Path | None = None, stage: str = STAGES[0].name
    ) -> None:
        self.work, self.device = work, torch.device(device)
        self.stages = [Stage(**{**vars(s), "steps": max(1, round(s.steps * scale))}) for s in STAGES]
        self.tokenizer = build_tokenizer()
        self.model = build_model(build_config(self.tokenizer), seed).to(self.device)
        if init:
            self.model.load_state_dict(LlavaForConditionalGeneration.from_pretrained(init, dtype=torch.float32).state_dict())
        self._compile()
        self.heads = TowerHeads(self.model.config.vision_config.hidden_size).to(self.device)
        self.words = WordClasses(self.tokenizer).to(self.device)
        self.seed = seed
        names = [s.name for s in STAGES]
        if stage not in names:
            raise ValueError(f"stage {stage!r} is not one of {', '.join(names)}")
        self.stage_index, self.step = names.index(stage), 0
        self.optimizer_state: dict[str, Any] | None = None
        self._restore()

    def _compile(self) -> None:
        # On a CPU most of the time goes into element-wise passes and the fused attention's backward; one compiled layer of
        # plain attention takes half as long (measured: 1.5 s to 0.9 s a step).
        self.model.set_attn_implementation("eager")
        if self.device.type == "cuda" or shutil.which("g++"):
            for layer in (*self.model.model.language_model.layers, *self.model.model.vision_tower.encoder.layers):
                layer.compile(dynamic=False)

    @property
    def _state(self) -> Path:
        return self.work / "state.pt"

    def _restore(self) -> None:
        if not self._state.exists():
            return
        state = torch.load(self._state, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage_index, self.step, self.optimizer_state = state["stage"], state["step"], state["optimizer"]

    def save(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        part = self._state.with_suffix(".part")
        torch.save(
            {
                "model": self.model.state_dict(), "heads": self.heads.state_dict(), "stage": self.stage_index,
                "step": self.step, "optimizer": optimizer.state_dict() if optimizer else None,
            },
            part,
        )  # fmt: skip
        part.replace(self._state)

    def run(self) -> None:
        while self.stage_index < len(self.stages):
            self._run_stage(self.stages[self.stage_index])
            self.stage_index, self.step, self.optimizer_state = self.stage_index + 1, 0, None
            self.save(None)

    def _parameters(self, stage: Stage) -> list[nn.Parameter]:
        tower = list(self.model.model.vision_tower.parameters())
        if stage.mix is None:
            return tower + list(self.heads.parameters())
        rest = [*self.model.model.multi_modal_projector.parameters(), *self.model.model.language_model.parameters(),
                *self.model.lm_head.parameters()]  # fmt: skip
        return tower + rest if stage.train_tower else rest

    def _run_stage(self, stage: Stage) -> None:
        self.model.requires_grad_(False)
        parameters = self._parameters(stage)
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        if self.optimizer_state:
            optimizer.load_state_dict(self.optimizer_state)
        packer = Packer(self.tokenizer, (GRID // stage.pool) ** 2)
        first_scene = 10_000_000 * (self.seed * len(STAGES) + self.stage_index)
        batches = Batches(packer, stage.mix, stage.batch, range(self.step, stage.steps), first_scene, stage.families)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        saved = logged = time.monotonic()
        with Progress(*columns) as progress:
            task = progress.add_task(stage.name, total=stage.steps, completed=self.step)
            for batch in DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4):
                loss, right = self._train_step(batch, stage, optimizer, parameters, packer.first_visual)
                self.step += 1
                progress.update(task, advance=1, description=f"{stage.name} loss {loss:.3f} right {right:.3f}")
                if time.monotonic() - logged > 20:
                    logged = time.monotonic()
                    self._log(stage=stage.name, step=self.step, loss=round(loss, 4), right=round(right, 4))
                if time.monotonic() - saved > SAVE_EVERY_S:
                    saved = time.monotonic()
                    self.save(optimizer)

    def _log(self, **fields: object) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        with (self.work / "log.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time()), **fields}) + "\n")

    def _train_step(
        self, batch: dict[str, Tensor], stage: Stage, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter],
        first_visual: int,
    ) -> tuple[float, float]:  # fmt: skip
        batch = {k: v.to(self.device) for k, v in batch.items()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.step, stage)
        with torch.autocast(self.device.type, torch.bfloat16):
            if stage.mix is None:
                loss, right = self.heads.loss(tower_hidden(self.model, batch["pixels"]), batch)
            else:
                answers, grounding, right = language_loss(self.model, batch, stage, first_visual, self.words)
                loss = answers + GROUNDING_WEIGHT * grounding
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item(), right


def main(
    work: Annotated[Path, typer.Option(help="Where states are kept; a killed run goes on from here.")] = Path("runs/embedded"),
    out: Annotated[Path, typer.Option(help="Where the finished checkpoint goes.")] = Path("checkpoints/embedded/weights/dense"),
    seed: Annotated[int, typer.Option(help="Weights and pictures.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    scale: Annotated[float, typer.Option(help="Multiplies the steps of every stage.")] = 1.0,
    init: Annotated[Path | None, typer.Option(help="Start from this checkpoint's weights, to train it further.")] = None,
    stage: Annotated[str, typer.Option(help="First stage to run.")] = STAGES[0].name,
) -> None:
    trainer = Trainer(work, seed, device, scale, init, stage)
    trainer.run()
    export(trainer.model, out)


if __name__ == "__main__":
    typer.run(main)
