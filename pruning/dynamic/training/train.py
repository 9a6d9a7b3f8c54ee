"""`espalier route`: a router trained for a checkpoint, from pictures and questions alone.

The un-pruned model is asked and watched (`watch`); the router learns to foresee what was seen (`fit`) and to write into the
tokens that stay (`writing`); and on pictures that were held out it is found what to trust it with (`judge`). Each part is kept on
disk as it is finished, and a run that was stopped goes on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from models.checkpoint import Checkpoint, load, open_transformers, sha256
from models.manifest import Manifest, read_manifest, write_manifest
from models.run_state import RunState
from models.saving import derive
from pruning import samples
from pruning.dynamic.router import Router, Shape, default_rows
from pruning.dynamic.router_file import FILE, RouterRecord, save_router
from pruning.dynamic.training.config import Lesson
from pruning.dynamic.training.dataset import Watched, watch
from pruning.dynamic.training.distill import writing_error
from pruning.dynamic.training.loop import foreseen, foresight_error, learn, read
from pruning.dynamic.training.profile import judge, ways


def run(
    lesson: Lesson, checkpoint: Path, out: Path, device: str = "cpu", dtype: str = "auto", quiet: bool = False
) -> Manifest:
    """Train a router for `checkpoint` and write both to the directory `out`. Returns its manifest.

    Raises CheckpointError, DataError and ValueError before the work; a run that ends early goes on when it is started again.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a directory that does not, or remove it")
    lesson = lesson.model_copy(update={"data": samples.choose(lesson.data, checkpoint)})
    source = load(checkpoint, device, dtype)
    work = RunState(out, lesson.model_dump(), f"{source.name} {source.fingerprint} {dtype} {samples.content(lesson.data)}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True, quiet=quiet)
    if work.resumed:
        console.print(f"going on with the run in {work.directory}", highlight=False)
    with Progress(*columns, console=console) as progress:
        watched = watch(lesson, source, work, progress)
        router = teach(lesson, source, (device, dtype), watched, work, progress)
        served = router.serving(source.model.dtype)
        judged = judge(lesson, source, served, watched, work, progress)
        router.adopt(served)
    held = (watched.picture >= lesson.taught).nonzero()[:, 0]
    report = {"foreseen": foreseen(router, source.model.embed, watched, held), "questions": len(watched.picture)}
    record = RouterRecord(
        shape=router.shape.document(), checkpoint=source.fingerprint, lesson=lesson.model_dump(), report=report, **judged
    )
    draft = work.directory / "checkpoint"
    shutil.rmtree(draft, ignore_errors=True)
    derive(source.directory, draft, {}, source.manifest.derive())
    save_router(router, draft / FILE)
    files = read_manifest(draft).files | {FILE: sha256(draft / FILE)}
    write_manifest(draft, source.manifest.derive(router=record.model_dump(), files=files))
    draft.replace(out)
    shutil.rmtree(work.directory)
    return read_manifest(out)


def teach(
    lesson: Lesson, source: Checkpoint, place: tuple[str, str], watched: Watched, work: RunState, progress: Progress
) -> Router:
    """Both lessons. The second one runs through transformers' model, which is loaded for it and let go."""
    torch.manual_seed(lesson.seed)
    model, width = source.model, watched.visual.shape[-1]
    shape = Shape(width, model.num_layers, lesson.rows or default_rows(width), rungs=len(ways(source)) - 1)
    router = Router(shape).to(model.device)

    def foresee(step: int, asked: Watched) -> Tensor:
        return foresight_error(read(router, model.embed, asked))

    learn("foreseeing", router, watched, lesson, lesson.steps, lesson.rate, foresee, work, progress)
    if lesson.writing:
        teacher = open_transformers(source.directory, *place).model.requires_grad_(False)
        # On CPU the backward pass of the fused attention costs more than all the rest.
        teacher.set_attn_implementation("eager" if model.device.type == "cpu" else "sdpa")

        def write(step: int, asked: Watched) -> Tensor:
            return writing_error(router, teacher, asked, lesson.seed * 1_000_003 + step)

        learn("writing", router.write, watched, lesson, lesson.writing, lesson.writing_rate, write, work, progress)
    return router.requires_grad_(False).eval()
