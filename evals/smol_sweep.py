"""Everything that docs/smol_results.md claims, run by one command: `python -m evals.smol_sweep`, or `make smol-results`.

Of smol as it ships, of three routers trained for it, of pruned, finetuned and quantised weights. One JSON document a run is
stored as it ends; what is stored is not run again, and a router or a mask that was made is used again, so a sweep that was
stopped goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from checkpoints.shipped import resolve
from evals import easy_vqa, exam, pruning_sweep, routing_sweep
from evals.runs import store, stored
from evals.tasks import open_task
from models.manifest import read_manifest
from pruning.dynamic.training.config import TrainingConfig
from pruning.dynamic.training.train import run as train_router
from pruning.finetuning.config import FinetuneConfig
from pruning.finetuning.train import run as finetune
from pruning.static.pipeline import run as prune
from pruning.static.recipe import read

ROUTERS = 3
LEVELS = ("light", "balanced", "strong")
HALVES: dict[str, dict[str, Any]] = {
    "half": {"sparsity": 0.5, "samples": 192},
    "half-alps": {"criterion": "alps", "sparsity": 0.5, "samples": 192},
}
"""The recipes of the masks that the levels are combined with."""
TUNED, TUNED_EASY_VQA = "-finetuned", "easy-vqa-finetuned"
"""What `espalier finetune` makes of those masks, and of dense weights on the training split of easy-VQA."""
TUNING = {"levels": ("off", "balanced", "strong"), "learning_rate": 1e-3}
"""How the former are trained."""
EASY_VQA_PICTURES = 4000
"""All of that split."""


@dataclass(frozen=True)
class Exam:
    """One run of `espalier eval`: on smol as it ships or on what was made of it (`variant`), with a task's options."""

    variant: str
    task: str
    level: str
    split: str | None = None
    paraphrase: str | None = None
    quantization: str | None = None

    @property
    def options(self) -> dict[str, str]:
        given = {"split": self.split, "paraphrase": self.paraphrase}
        return {name: value for name, value in given.items() if value}


def exams() -> Iterator[Exam]:
    """Every row of the page, those that need nothing made first."""
    for split, paraphrase in (("test", "seen"), ("test", "held_out"), ("known", "seen")):
        yield Exam("smol", "things", "off", split, paraphrase)
    yield Exam("smol", "names", "off", "test", "seen")
    yield Exam("smol", "photographs", "off", "test")
    yield Exam("smol", "easy-vqa", "off", "test")
    for task in ("things", "easy-vqa"):
        for level in LEVELS:
            yield Exam("smol", task, level, "test", "seen" if task == "things" else None)
    for quantization in ("int8", "nf4"):
        yield Exam("smol", "things", "off", "test", "seen", quantization)
    for half in HALVES:
        for variant in (half, half + TUNED):
            for level in ("off", "balanced"):
                yield Exam(variant, "things", level, "test", "seen")
    yield Exam(TUNED_EASY_VQA, "easy-vqa", "off", "test")
    for seed in range(ROUTERS):
        for level in (*LEVELS, "auto"):
            yield Exam(f"router-{seed}", "things", level, "test", "seen")


def made(variant: str, work: Path, device: str, dtype: str, pictures: int) -> Path:
    """The directory of a variant; it is made where it is missing."""
    if variant == "smol":
        return resolve("smol")
    out = work / variant
    if not out.exists():
        work.mkdir(parents=True, exist_ok=True)
        if variant in HALVES:
            prune(read(None, HALVES[variant]), resolve("smol"), out, device, dtype)
        elif (name := variant.removesuffix(TUNED)) in HALVES:
            half = made(name, work, device, dtype, pictures)
            finetune(FinetuneConfig.model_validate(TUNING), half, out, resolve("smol"), device, dtype)
        elif variant == TUNED_EASY_VQA:
            given = {"data": str(easy_vqa.write_rows(work)), "samples": EASY_VQA_PICTURES}
            finetune(FinetuneConfig.model_validate(given), resolve("smol"), out, None, device, dtype)
        else:
            config = TrainingConfig.model_validate({"seed": int(variant.removeprefix("router-")), "pictures": pictures})
            train_router(config, resolve("smol"), out, device, dtype)
    return out


def main(
    runs: Annotated[Path, typer.Option(help="The folder of stored runs.")] = Path("docs/runs"),
    work: Annotated[Path, typer.Option(help="Where routers and pruned weights are made.")] = Path("runs/smol-results"),
    questions: Annotated[int, typer.Option(min=1, help="Of each exam, at most.")] = 4000,
    pictures: Annotated[int, typer.Option(min=8, help="That each router learns from and is measured on.")] = 3000,
    only: Annotated[str, typer.Option(help="Only exams whose variant, task and level contain this text.")] = "",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto (as saved), float32 or bfloat16.")] = "auto",
) -> None:
    console, path = Console(stderr=True), runs / "smol.jsonl"
    for one in exams():
        text = " ".join(filter(None, (one.variant, one.task, *one.options.values(), one.level, one.quantization)))
        if only not in text or any(_is(document, one) for document in stored(path)):
            continue
        console.rule(text)
        directory = made(one.variant, work, device, dtype, pictures)
        task = open_task(one.task, questions, **one.options)
        document = exam.run(directory, task, one.level, None, device, dtype, False, one.quantization)
        tuned = read_manifest(directory).finetuning or {}
        store(path, [document | {"variant": one.variant} | ({"finetuned_on": tuned["samples"]} if tuned else {})])
    if only:
        return
    console.rule("masks")
    pruning_sweep.main(runs / "smol_pruning.jsonl", "smol", seeds=1, dtype=dtype)
    for seed in range(ROUTERS):
        console.rule(f"router {seed}, all budgets")
        routed = str(made(f"router-{seed}", work, device, dtype, pictures))
        routing_sweep.policies(routed, runs / "smol_routes.jsonl", "smol", seed=seed, device=device, dtype=dtype)
        routing_sweep.levels(routed, runs / "smol_levels.jsonl", "smol", seed=seed, device=device, dtype=dtype)


def _is(document: dict[str, Any], one: Exam) -> bool:
    """Whether a stored document is of an exam; those that name no variant are of smol."""
    found = {"variant": "smol", "quantization": None} | document
    return all(found.get(name) == value for name, value in asdict(one).items())


if __name__ == "__main__":
    typer.run(main)
