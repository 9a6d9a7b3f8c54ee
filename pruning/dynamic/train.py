"""`espalier route`: a router trained for a checkpoint, from pictures and questions alone.

First the un-pruned model is asked and watched: where does it look? Then the router learns to foresee that. Both parts are kept on
disk as they are finished, and a run that was stopped goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.checkpoint import Checkpoint, Manifest, RouterRecord, load, read_manifest, sha256, write_manifest
from models.llava import Llava
from models.pictures import Picture, from_file, from_world
from models.saving import derive
from models.work import Work
from pruning.dynamic.gaze import Asked, answers, gaze, words
from pruning.dynamic.router import FILE, Router, Shape, save_router

WORLD = "world"
CHUNK = 8
"""Pictures watched between two saves."""
LEAST = 1e-4
"""Attention below this is none."""
SAVE_EVERY = 200
"""Steps between two saves of the fit."""


class Lesson(BaseModel):
    """What a router is taught, and how long. Written into the manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(WORLD, description="`world`, or a JSONL file of pictures and questions.")
    pictures: int = Field(900, ge=2)
    questions: int = Field(8, ge=1, description="Of each picture, at most.")
    answer: int = Field(24, ge=1, description="Tokens of an answer that are watched.")
    rows: int = Field(0, ge=0, multiple_of=8, description="The router's width; a quarter of the model's by default.")
    steps: int = Field(3000, ge=1)
    batch: int = Field(32, ge=1)
    rate: float = Field(3e-3, gt=0)
    seed: int = 0


def run(
    lesson: Lesson, checkpoint: str, out: Path, device: str = "cpu", dtype: str = "auto", quiet: bool = False
) -> Manifest:
    """Train a router for `checkpoint` and write both to the directory `out`. Returns its manifest.

    Raises CheckpointError, DataError and ValueError before the work; a run that ends early goes on when it is started again.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a directory that does not, or remove it")
    if lesson.data != WORLD and not Path(lesson.data).is_file():
        raise ValueError(f"data: {lesson.data} is not a file; name a JSONL file, or `{WORLD}`")
    source = load(checkpoint, device, dtype)
    content = "" if lesson.data == WORLD else sha256(Path(lesson.data))
    work = Work(out, lesson.model_dump(), f"{source.name} {source.fingerprint} {dtype} {content}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, quiet=quiet)
    if work.resumed:
        console.print(f"going on with the run in {work.directory}", highlight=False)
    with Progress(*columns, console=console) as progress:
        watched = watch(lesson, source, work, progress)
        router, report = fit(lesson, source.model, watched, work, progress)
    draft = work.directory / "checkpoint"
    shutil.rmtree(draft, ignore_errors=True)
    derive(source.directory, draft, {}, source.manifest)
    save_router(router, draft / FILE)
    files = read_manifest(draft).files | {FILE: sha256(draft / FILE)}
    record = RouterRecord(shape=router.shape.document(), checkpoint=source.fingerprint, lesson=lesson.model_dump(), report=report)
    write_manifest(draft, source.manifest.model_copy(update={"router": record, "files": files, "cards": {}}))
    draft.replace(out)
    shutil.rmtree(work.directory)
    return read_manifest(out)


Watched = dict[str, Tensor]
"""visual [pictures, tokens, width]; and by question: picture [n], words [n, most] (-1 behind the last), gaze [n, tokens]."""


def watch(lesson: Lesson, source: Checkpoint, work: Work, progress: Progress) -> Watched:
    """Ask the un-pruned model about every picture, and see where it looks."""
    task = progress.add_task("watching", total=lesson.pictures)
    found: list[Watched] = []
    pictures = iter(_pictures(lesson))
    for number in range(0, lesson.pictures, CHUNK):
        here = list(islice(pictures, CHUNK))
        stored = work.read_tensors(f"watched-{number}")
        if stored is None:
            work.write_tensors(f"watched-{number}", _watch(lesson, source, here), {})
            stored = work.read_tensors(f"watched-{number}")
        assert stored is not None
        found.append(stored[0] | {"picture": stored[0]["picture"] + number})
        progress.advance(task, len(here))
    longest = max(chunk["words"].shape[1] for chunk in found)
    return {
        "visual": torch.cat([chunk["visual"] for chunk in found]),
        "picture": torch.cat([chunk["picture"] for chunk in found]),
        "words": torch.cat([F.pad(chunk["words"], (0, longest - chunk["words"].shape[1]), value=-1) for chunk in found]),
        "gaze": torch.cat([chunk["gaze"] for chunk in found]),
    }


def _pictures(lesson: Lesson) -> Iterator[Picture]:
    if lesson.data == WORLD:
        return from_world(lesson.pictures, lesson.seed + 1000, "train")  # not those that masks were made on
    return from_file(Path(lesson.data), lesson.pictures, lesson.seed, answered=False)


@torch.inference_mode()
def _watch(lesson: Lesson, source: Checkpoint, pictures: Iterable[Picture]) -> Watched:
    model, preprocessor = source.model, source.preprocessor
    visual, picture, asked = [], [], []
    for number, shown in enumerate(pictures):
        pixels = preprocessor.pixels(shown.image)[None].to(model.device, model.dtype)
        visual.append(model.vision(pixels).tokens[0])
        for text, _ in shown.turns[: lesson.questions]:
            content = [{"type": "image"}, {"type": "text", "text": text}]
            asked.append(Asked(preprocessor.prompt([{"role": "user", "content": content}]), visual[-1]))
            picture.append(number)
    said = answers(model, asked, source.eos, lesson.answer)
    image = model.config.image_token_id
    return {
        "visual": torch.stack(visual),
        "picture": torch.tensor(picture),
        "words": pad_sequence([torch.tensor(words(one.prompt, image)) for one in asked], batch_first=True, padding_value=-1),
        "gaze": torch.stack([gaze(model, one, answer) for one, answer in zip(asked, said, strict=True)]),
    }


def fit(
    lesson: Lesson, model: Llava, watched: Watched, work: Work, progress: Progress
) -> tuple[Router, dict[str, Any]]:
    """Regress the logarithm of the gaze; a twentieth of the pictures is held out to say how much of it is foreseen."""
    torch.manual_seed(lesson.seed)
    width = watched["visual"].shape[-1]
    router = Router(Shape(width, lesson.rows or max(16, width // 32 * 8))).to(model.device)
    optimizer = torch.optim.AdamW(router.parameters(), lesson.rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, lesson.steps))
    held = watched["picture"] >= lesson.pictures - max(1, lesson.pictures // 20)
    learned, kept_back = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    start = _restore(work, router, optimizer, schedule)
    task = progress.add_task("fitting", total=lesson.steps, completed=start)
    for step in range(start, lesson.steps):
        draw = torch.Generator().manual_seed(lesson.seed * 1_000_003 + step)
        chosen = learned[torch.randint(len(learned), (lesson.batch,), generator=draw)]
        scores, wanted = _foresee(router, model, watched, chosen)
        loss = F.mse_loss(scores, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(router.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(task, advance=1, description=f"fitting, error {float(loss.detach()):.3f}")
        if (step + 1) % SAVE_EVERY == 0:
            _save(work, router, optimizer, step + 1)
    return router.requires_grad_(False), {"foreseen": _foreseen(router, model, watched, kept_back), "questions": len(held)}


def _rate(step: int, steps: int) -> float:
    """Warm up, then fall to a hundredth."""
    return min(1.0, (step + 1) / min(100, steps)) * max(0.01, 1 - step / steps)


def _foresee(router: Router, model: Llava, watched: Watched, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and what they should be, both [chosen, visual tokens]."""
    visual = watched["visual"][watched["picture"][chosen]].to(model.device)
    read = watched["words"][chosen].to(model.device)
    scores = router(visual, model.embed(read.clamp_min(0)), read >= 0)
    return scores, watched["gaze"][chosen].to(model.device).clamp_min(LEAST).log()


@torch.no_grad()
def _foreseen(router: Router, model: Llava, watched: Watched, chosen: Tensor) -> float:
    """Share of the variance of the held-out gaze that the scores explain (R²)."""
    pairs = [_foresee(router, model, watched, part) for part in torch.split(chosen, 64)]
    scores, wanted = (torch.cat(part) for part in zip(*pairs, strict=True))
    return round(1 - float(((scores - wanted) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum()), 4)


def _save(work: Work, router: Router, optimizer: torch.optim.AdamW, step: int) -> None:
    tensors = {f"router.{name}": tensor for name, tensor in router.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in state.items()}
    work.write_tensors("fit", tensors, {"step": step})


def _restore(
    work: Work, router: Router, optimizer: torch.optim.AdamW, schedule: torch.optim.lr_scheduler.LambdaLR
) -> int:
    """The step to go on with."""
    stored = work.read_tensors("fit")
    if stored is None:
        return 0
    tensors, record = stored
    router.load_state_dict({name.removeprefix("router."): t for name, t in tensors.items() if name.startswith("router.")})
    document = optimizer.state_dict()
    document["state"] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            document["state"].setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict(document)
    step = int(record["step"])
    schedule.last_epoch = step
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * schedule.lr_lambdas[0](step)
    return step
