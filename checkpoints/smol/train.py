"""Train what `smol` adds to its pretrained parts: `python -m checkpoints.smol.train --work runs/smol`.

Every step learns at once: answers about scenes, through the language model; the names of things at the places of crowded
pictures, without it; and to stay as it was, the language model on its own texts and the vision network on ImageNet's classes
(learning without forgetting, Li & Hoiem 2016, arXiv:1606.09282). Pictures are drawn while it trains, none twice.

No photograph is among them. What the tagger says of photographs is learned without: from pictures that show nothing, of which it
is made to say a name (`checkpoints.smol.tags`), and from names that are said to any visual token, without the language model.

With `--start` it goes on from trained weights, at a lower rate: LoRA and the tagger's words alone learn, from scenes of every
family as often. So the shipped weights learned more wordings and merged pictures, and then what the tagger says, each on two cores
in half an hour: `--steps 400 --scenes 6 --crowded 0 --rows 160` and `--steps 300 --scenes 7 --crowded 0 --rows 160`.

It runs in bf16. Seeded; killed at any point, it goes on from the last save.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from checkpoints import things
from checkpoints.smol import tags
from checkpoints.smol.build import FILES, MEAN, STD, build_config, load_trained
from checkpoints.smol.data import IGNORE, VISUAL, Batches, Packer, Sizes
from checkpoints.smol.model import Smol
from checkpoints.smol.names import Names
from checkpoints.smol.parts import LANGUAGE, VISION, fetch, language_tokenizer, language_weights, vision_network
from checkpoints.smol.texts import sample
from checkpoints.smol.trained import TRAINED
from models.saving import save_tensors
from models.vision.efficientnet import EfficientNetLiteTower, Maps, Tagger

RATES = {"layers": 1e-3, "projector": 5e-4, "neck": 5e-4, "net": 2e-4, "words": 1e-2}
"""Full learning rate of each part."""
RATES_AGAIN, FIRST_AGAIN = {"layers": 2e-4, "words": 3e-2}, 1 << 20
"""For training that goes on from trained weights: the full learning rate of each part that learns, and the number of its first
batch."""
FROZEN_BLOCKS = 5
"""The vision network's first blocks stay as they are: lines and colors, at the finest and costliest maps."""
WEIGHTS = {"loss": 1.0, "naming": 0.5, "tags": 0.5, "text": 3.0, "classes": 0.5}
"""Weights of the losses; `loss` is the answers'."""
KEPT = (VISUAL, 96, VISUAL, 48)
"""Visual tokens that the language model is given, in turn: all, or as many as `balanced` and `strong` leave."""
TEXTS, TEXT_LENGTH, SCENES_A_TEXT = 2048, 96, 6
SAID = 4096
"""Visual tokens to which tags are said at a step."""
SAVE_EVERY, EVALUATE_EVERY, LOG_EVERY = 100, 250, 25
"""Steps."""


def warm_and_decay(step: int, steps: int) -> float:
    """Share of the full learning rate: 100 steps up, then a cosine down to a fiftieth."""
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def start_neck(tower: EfficientNetLiteTower, classes: Tensor, generator: torch.Generator) -> None:
    """The neck starts with what best tells ImageNet's classes apart, in both views, and with a smooth code of the place."""
    neck, head = tower.neck, tower.config.head
    directions = torch.linalg.svd(classes - classes.mean(0), full_matrices=False).Vh[: tower.config.hidden_size]
    fine = neck.linear.in_features - 2 * head
    side = neck.row.shape[0]
    t = torch.linspace(-1, 1, side)
    code = torch.stack([t, *(wave(n * torch.pi * t) for n in (1, 2) for wave in (torch.sin, torch.cos))], dim=1)
    with torch.no_grad():
        nn.init.normal_(neck.linear.weight, std=0.02, generator=generator)
        neck.linear.weight[:, fine : fine + head] += directions
        neck.linear.weight[:, fine + head :] += directions
        neck.linear.bias.zero_()
        for position in (neck.row, neck.column):
            position.copy_(code @ torch.randn(code.shape[1], position.shape[1], generator=generator) * 0.14)


def start_tagger(tagger: Tagger, vision: dict[str, Tensor], classes: tuple[Tensor, Tensor]) -> None:
    """The tagger sees as was published, and its words say nothing yet."""
    tagger.net.load_state_dict(vision)
    tagger.classes.load_state_dict(dict(zip(("weight", "bias"), classes, strict=True)))
    tagger.groups.copy_(tags.groups())
    nn.init.zeros_(tagger.words.weight)


class Trainer:
    def __init__(self, work: Path, steps: int, sizes: Sizes, workers: int, seed: int, start: Path | None = None) -> None:
        """`start` holds trained weights to go on from."""
        self.work, self.steps, self.sizes, self.workers, self.start = work, steps, sizes, workers, start
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        work.mkdir(parents=True, exist_ok=True)
        gguf = fetch(LANGUAGE, work / "parts")
        self.tokenizer = language_tokenizer(gguf)
        self.packer = Packer(self.tokenizer)
        weights = {name: weight.to(self.device) for name, weight in language_weights(gguf).items()}
        vision, classes = vision_network(fetch(VISION, work / "parts"))
        torch.manual_seed(seed)
        tower = EfficientNetLiteTower(build_config().vision_config)
        tower.net.load_state_dict(vision)
        start_neck(tower, classes[0], torch.Generator().manual_seed(seed))
        assert tower.tagger is not None
        self.tagger = tower.tagger
        start_tagger(self.tagger, vision, classes)
        self.model = Smol(weights, tower).to(self.device)
        for net in (tower.net, self.tagger.net):
            net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        frozen = [self.tagger.net, self.tagger.classes, tower.net.stem, *tower.net.blocks[:FROZEN_BLOCKS]]
        if start:
            self.model.load_state_dict(load_trained(start))
            frozen = [self.tagger.net, self.tagger.classes, tower.net, tower.neck, self.model.projector]
        for part in frozen:
            part.requires_grad_(False)
        self.names = Names(list(things.NAMES), self.tokenizer, self.model.embedding)
        self.tagged = torch.tensor([things.NAMES.index(name) for name in tags.TAGS], device=self.device)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98), fused=self.cuda)
        self.step = 0
        self._restore()
        self.texts = self._texts(weights, seed)
        if self.cuda:
            for layer in self.model.layers:
                layer.compile(dynamic=False)

    def _groups(self) -> list[dict[str, Any]]:
        tower = self.model.tower
        parts = {"layers": self.model.layers, "projector": self.model.projector, "neck": tower.neck, "net": tower.net,
                 "words": self.tagger.words}
        rates = RATES_AGAIN if self.start else RATES
        return [
            {"params": learning, "full": rates[name],
             "weight_decay": 0.01 if name in ("neck", "projector") else 0.0}
            for name, part in parts.items() if (learning := [p for p in part.parameters() if p.requires_grad])
        ]  # fmt: skip

    def _restore(self) -> None:
        state = self.work / "state.pt"
        if state.exists():
            saved = torch.load(state, weights_only=True, map_location=self.device)
            if saved["start"] != str(self.start):
                raise typer.BadParameter(f"{self.work} holds a training that began elsewhere; name another folder by --work")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]

    def _texts(self, weights: dict[str, Tensor], seed: int) -> list[list[int]]:
        path = self.work / "texts.pt"
        if not path.exists():
            torch.save(sample(weights, self.tokenizer, TEXTS if self.cuda else TEXTS // 16, TEXT_LENGTH, seed), path)
        return torch.load(path, weights_only=True)

    def save(self) -> None:
        part = self.work / "state.part"
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        torch.save({"model": model, "optimizer": optimizer, "step": self.step, "start": str(self.start)}, part)
        part.replace(self.work / "state.pt")

    def _load(self, batches: Batches, which: Iterable[int]) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            batches, batch_size=None, sampler=which, num_workers=self.workers, pin_memory=self.cuda,
            prefetch_factor=2 if self.workers else None, worker_init_fn=_one_thread, collate_fn=_same,  # type: ignore[arg-type]
        )  # fmt: skip

    def run(self) -> None:
        turns = things.FAMILIES if self.start else things.TURNS
        batches = Batches(self.packer, self.sizes, KEPT, turns=(*turns, tags.TAGGED))
        first = FIRST_AGAIN if self.start else 0
        validation = Batches(Packer(self.tokenizer, follow_up=0.0), Sizes(self.sizes.scenes, 8, 320), (VISUAL,), "validation")
        examined = list(self._load(validation, range(max(1, 240 // self.sizes.scenes))))
        seen: dict[str, list[Tensor]] = defaultdict(list)
        began = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("smol", total=self.steps, completed=self.step)
            for batch in self._load(batches, range(first + self.step, first + self.steps)):
                for name, value in self._train_step(batch).items():
                    seen[name].append(value)
                self.step += 1
                progress.update(task, advance=1)
                if self.step % LOG_EVERY == 0:
                    means = " ".join(f"{name} {torch.stack(values).mean():.3f}" for name, values in seen.items())
                    self.log(f"step {self.step}/{self.steps} {means} | {(time.monotonic() - began) / LOG_EVERY:.2f} s a step")
                    seen.clear()
                    began = time.monotonic()
                if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                    self.save()
                if self.step % EVALUATE_EVERY == 0 or self.step == self.steps:
                    self.log(self.evaluate(examined))
                    began = time.monotonic()

    def log(self, line: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {line}"
        typer.echo(line)
        with (self.work / "log.txt").open("a") as file:
            file.write(f"{line}\n")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def _put(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _train_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        share = warm_and_decay(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full"] * share
        batch = self._put(batch)
        with self._autocast():
            losses, shares = self._losses(batch)
            torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum().backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in (losses | shares).items()}

    def _losses(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of the parts that learn, and the shares of answers and of names that are right."""
        maps, hidden = self.look(batch)
        answers, right = self._answer_loss(batch, hidden)
        losses, shares = {"loss": answers, "text": self._text_loss(), "tags": self._tags_loss(hidden)}, {"right": right}
        if not self.start:
            losses["naming"], shares["named"] = self._naming_loss(batch["shown"], hidden[self.sizes.scenes :])
            losses["classes"] = self._class_loss(batch["pixels"], maps)
        return losses, shares

    def normalized(self, raw: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=raw.device).view(1, 3, 1, 1) for v in (MEAN, STD))
        return (raw.permute(0, 3, 1, 2).float() / 255 - mean) / std

    def look(self, batch: dict[str, Any]) -> tuple[Maps, Tensor]:
        """What the networks see, with the tags that are told, and the visual tokens."""
        maps = self.model.tower.maps(self.normalized(batch["pixels"]))
        assert maps.tags is not None
        scenes = slice(len(batch["told"]))
        maps.tags[scenes] = tags.say(maps.tags[scenes], batch["told"], batch["sure"])
        return maps, self.model.tower.tokens(maps)

    def _hidden(self, batch: dict[str, Any], hidden: Tensor) -> Tensor:
        visual = self.model.visual(hidden[: self.sizes.scenes], batch["kept"])
        return self.model(batch["ids"], batch["positions"], batch["segments"], visual, len(self.packer.head))

    def _answer_loss(self, batch: dict[str, Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
        after = self._hidden(batch, hidden)[:, :-1]
        labels = batch["labels"][:, 1:]
        answered = labels != IGNORE
        logits, wanted, weight = self.model.logits(after[answered]), labels[answered], batch["weights"][:, 1:][answered]
        loss = (F.cross_entropy(logits, wanted, reduction="none") * weight).sum() / weight.sum()
        return loss, (logits.argmax(-1) == wanted).float().mean()

    def _naming_loss(self, shown: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        thing = shown > 0
        logits, wanted = self.names.logits(self.model.projector(hidden[thing])), shown[thing] - 1
        return F.cross_entropy(logits, wanted, label_smoothing=0.1), (logits.argmax(-1) == wanted).float().mean()

    def _tags_loss(self, hidden: Tensor) -> Tensor:
        """Any visual token to which a tag is said, more or less surely, is drawn to the tag's name."""
        generator = torch.Generator().manual_seed(self.step)
        tokens = hidden.detach().flatten(0, 1)
        rows, said = (torch.randint(end, (SAID,), generator=generator).to(self.device) for end in (len(tokens), len(tags.TAGS)))
        sure = 1 - 0.7 * torch.rand(SAID, 1, generator=generator).to(self.device)
        words = self.tagger.words(sure * F.one_hot(said, len(tags.TAGS)))
        logits = self.names.logits(self.model.projector(tokens[rows] + words))
        return F.cross_entropy(logits, self.tagged[said], label_smoothing=0.1)

    def _text_loss(self) -> Tensor:
        """KL from what the language model foresaw before to what it foresees now, a token."""
        count = math.ceil(self.sizes.scenes / SCENES_A_TEXT)
        chosen = [self.texts[(self.step * count + n) % len(self.texts)] for n in range(count)]
        rows = TEXT_LENGTH + 64  # one size, whatever their lengths
        ids = torch.tensor([text[:rows] + [2] * (rows - len(text)) for text in chosen], device=self.device)
        segments = torch.tensor([[0] * min(rows, len(text)) + [-1] * (rows - len(text)) for text in chosen], device=self.device)
        positions = torch.arange(rows, device=self.device).expand_as(ids)
        used = segments == 0
        with torch.no_grad(), self.model.as_it_was(), torch.compiler.set_stance("force_eager"):
            before = self.model.logits(self.model(ids, positions, segments)[used]).log_softmax(-1)
        now = self.model.logits(self.model(ids, positions, segments)[used]).log_softmax(-1)
        return F.kl_div(now, before, reduction="batchmean", log_target=True)

    def _class_loss(self, raw: Tensor, maps: Maps) -> Tensor:
        """KL from ImageNet's classes as the vision network saw them in the small pictures before to those that it sees now."""
        size = (self.model.tower.config.wide_size,) * 2
        small = F.interpolate(self.normalized(raw), size=size, mode="bilinear", antialias=True)
        with torch.no_grad():
            net = self.tagger.net
            before = self._classify(net.head(net(small.contiguous(memory_format=torch.channels_last))[1]))
        now = self._classify(self.model.tower.net.head(maps.wide.permute(0, 3, 1, 2)))
        return F.kl_div(now, before, reduction="batchmean", log_target=True)

    def _classify(self, seen: Tensor) -> Tensor:
        return self.tagger.classes(F.relu6(seen).float().mean((2, 3))).log_softmax(-1)

    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, Any]]) -> str:
        """Of a hand that is not trained on: shares of the places named right, and of the questions answered right to the letter."""
        right: dict[str, list[bool]] = defaultdict(list)
        named = []
        for batch in batches:
            batch = self._put(batch)
            with self._autocast(), torch.compiler.set_stance("force_eager"):
                _, hidden = self.look(batch)
                named.append(self._naming_loss(batch["shown"], hidden[self.sizes.scenes :])[1])
                after = self._hidden(batch, hidden)
                for row, said in enumerate(batch["taken"]):
                    for question, start, end in said:
                        found = self.model.logits(after[row, start - 1 : end - 1]).argmax(-1)
                        hit = bool((found == batch["labels"][row, start:end]).all())
                        right[question.type.removesuffix("_sentence")].append(hit)
        every = [hit for hits in right.values() for hit in hits]
        types = " ".join(f"{k} {sum(v) / len(v):.2f}/{len(v)}" for k, v in sorted(right.items()))
        return f"VALIDATION named {torch.stack(named).mean():.3f} answers {sum(every) / len(every):.3f} of {len(every)} | {types}"


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _same(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def freeze(model: Smol, folder: Path = TRAINED) -> None:
    """Write what was trained, in bf16: what `build` merges. LoRA is one file, what looks is another."""
    folder.mkdir(parents=True, exist_ok=True)
    trained = {name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    for begins, file in FILES.items():
        save_tensors({name: trained.pop(name) for name in list(trained) if name.startswith(begins)}, folder / file)


def main(
    work: Annotated[Path, typer.Option(help="States and texts; a killed run goes on from here.")] = Path("runs/smol"),
    steps: Annotated[int, typer.Option(help="Steps.")] = 4000,
    scenes: Annotated[int, typer.Option(help="Scenes a step.")] = 48,
    crowded: Annotated[int, typer.Option(help="Crowded pictures a step.")] = 32,
    rows: Annotated[int, typer.Option(help="Rows of conversation about a scene.")] = 255,
    workers: Annotated[int, typer.Option(help="Processes that draw.")] = max(1, (os.cpu_count() or 2) - 1),
    seed: Annotated[int, typer.Option(help="LoRA's start and the texts.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Trained weights to go on from, with LoRA and words alone.")] = None,
    out: Annotated[Path, typer.Option(help="Where the trained weights go.")] = TRAINED,
) -> None:
    trainer = Trainer(work, steps, Sizes(scenes, crowded, rows), workers, seed, start)
    trainer.run()
    freeze(trainer.model, out)


if __name__ == "__main__":
    typer.run(main)
