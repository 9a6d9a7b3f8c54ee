"""`espalier prune`: a recipe carried out, from a dense checkpoint to a pruned one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from models.checkpoint import open_transformers, sha256
from models.layer_shapes import LayerShape
from models.manifest import Manifest, Pruning, read_manifest
from models.preprocess import Preprocessor
from models.run_state import RunState
from models.saving import derive
from pruning.static import allocation, data, scores, search, structured, wanda
from pruning.static.allocation import Kept
from pruning.static.blocks import Block, blocks, collect, first_calls, linears, walk
from pruning.static.criteria import criterion, solve_block
from pruning.static.evaluate import connect
from pruning.static.fitness import Proxy
from pruning.static.patterns import NM, kept_weights
from pruning.static.recipe import WORLD, Recipe, RecipeError, check
from pruning.static.reconstruct import reconstruct


def run(
    recipe: Recipe, checkpoint: str, out: Path, device: str = "cpu", dtype: str = "auto", ray: str | None = None,
    quiet: bool = False, finish: Callable[[Path], object] = lambda directory: None,
) -> Manifest:  # fmt: skip
    """Prune `checkpoint` into the directory `out`. Returns its manifest.

    Statistics and search run in `dtype`; the files keep theirs. `finish` may complete the new checkpoint before it is published.

    Errors of the recipe, the checkpoint and the disk come before the work (RecipeError, CheckpointError); errors of the statistics
    name the matrix. A run that ends early goes on when it is started again: its finished parts wait in `out`.work.
    """
    directory = check(recipe, checkpoint, out)
    if ray:
        if recipe.allocation != "search":
            raise RecipeError("--ray spreads the evaluations of a search: it needs allocation search")
        connect(ray)
    work = _draft(recipe, directory, out, device, dtype, ray, Console(stderr=True, quiet=quiet))
    finish(work.draft)
    work.draft.replace(out)
    shutil.rmtree(work.directory)
    return read_manifest(out)


def _draft(recipe: Recipe, directory: Path, out: Path, device: str, dtype: str, ray: str | None, console: Console) -> RunState:
    """Write the draft of the new checkpoint. The model is let go on return: what comes after needs the room for the new one."""
    source = open_transformers(directory, device, dtype)
    source.model.requires_grad_(False)
    identity = f"{source.name} {source.fingerprint}"
    samples = _samples(recipe, source.preprocessor)
    content = "" if recipe.data == WORLD else sha256(Path(recipe.data))
    work = RunState(out, recipe.model_dump(mode="json"), f"{identity} {dtype} {content}")
    if work.resumed:
        console.print(f"going on with the run in {work.directory}", highlight=False)
    if work.draft.exists():  # stopped while it was completed
        return work
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        changed, report = Job(recipe, source.model, samples, work, progress, source.directory, ray).run()
    pruning = Pruning(recipe=recipe.model_dump(mode="json"), source=identity, **report)
    # What was measured on the dense checkpoint does not hold for this one.
    manifest = source.manifest.derive(pruning=pruning, calibration=None)
    settings, unread = structured.settle(source.model)
    derive(source.directory, work.draft, changed | unread, manifest, settings)
    return work


def _samples(recipe: Recipe, preprocessor: Preprocessor) -> list[data.Sample]:
    if recipe.data == WORLD:
        return data.embedded_world(preprocessor, recipe.samples, recipe.seed, families=recipe.families)
    return data.from_file(preprocessor, Path(recipe.data), recipe.samples, recipe.seed)


class Job:
    """One run's model, samples and finished parts."""

    def __init__(
        self, recipe: Recipe, model: LlavaForConditionalGeneration, samples: list[data.Sample], work: RunState, progress: Progress,
        checkpoint: Path, ray: str | None,
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.samples, self.work, self.progress = recipe, model, samples, work, progress
        self.checkpoint, self.ray = checkpoint, ray
        self.method = criterion(recipe.criterion, recipe.damping, recipe.block_size)
        self.report: dict[str, Any] = {"damping": {}, "reconstruction": {}, "notes": {}}

    def run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors that changed, by plain name, and the manifest's record."""
        # Before anything is pruned: the search compares with the dense model.
        proxy = Proxy.of(self.model, self.samples) if self.recipe.allocation == "search" else None
        kept = self._allocate()
        changed: dict[str, Tensor] = {}
        before = {name: linear.weight.numel() for name, linear in linears(self.model, self.recipe.towers).items()}
        for tower in self.recipe.towers:
            if self.recipe.pattern == "structured":
                self._cut(tower)
            elif tower == "language" and proxy:
                proxy = proxy.with_tower() if "vision" in self.recipe.towers else proxy
                found = search.search(
                    self.recipe, proxy, self.samples, self.work, self.progress, self.method, self.checkpoint, self.ray
                )
                self.report |= {"search": found.history, "projector": found.projector}
                self._prune(tower, found.kept)
                choice = found.finish()
                self.report["notes"]["divergence"] = choice.divergence
                if choice.damping is not None:
                    self.report |= {"damping": choice.damping, "reconstruction": {}}
                changed |= {f"projector.{key}": value for key, value in self.model.model.multi_modal_projector.state_dict().items()}
            else:
                self._prune(tower, kept)
        pruned = linears(self.model, self.recipe.towers)
        for tower in self.recipe.towers:
            for block in blocks(self.model, tower):
                changed |= structured.tensors(block)
        left = {name: int(linear.weight.count_nonzero()) for name, linear in pruned.items()}
        self.report["sparsity"] = {name: round(1 - left[name] / size, 6) for name, size in before.items()}
        return changed, self.report

    def _allocate(self) -> Kept:
        """Weights to keep of every matrix; for the language model under `search`, its uniform middle."""
        recipe = self.recipe
        budgets = [recipe.towers] if recipe.shared_budget else [[tower] for tower in recipe.towers]
        kept: Kept = {}
        for towers in budgets:
            sizes = {name: linear.weight.numel() for name, linear in linears(self.model, towers).items()}
            sparsity = recipe.vision_sparsity if towers == ["vision"] else recipe.sparsity
            if isinstance(recipe.parsed, NM):
                self._check_groups(towers, recipe.parsed.group)
            if recipe.pattern != "unstructured":
                kept |= {name: kept_weights(size, sparsity, recipe.parsed) for name, size in sizes.items()}
            elif recipe.allocation == "ecoflap":
                kept |= allocation.ecoflap(sizes, self._scores(towers), sparsity, recipe.largest_loss(sparsity), recipe.average)
            elif recipe.allocation == "owl":
                kept |= allocation.owl(sizes, self._outliers(towers), sparsity)
            else:
                kept |= allocation.uniform(sizes, sparsity)
        return kept

    def _check_groups(self, towers: list[str], group: int) -> None:
        for name, linear in linears(self.model, towers).items():
            if linear.in_features % group:
                raise RecipeError(f"pattern {self.recipe.pattern}: {name} has rows of {linear.in_features}, no multiple of {group}")

    def _scores(self, towers: list[str]) -> dict[str, float]:
        """ECoFLaP's score of each matrix; those of zeroth order are kept one by one, for they take long."""
        name = f"scores-{'-'.join(towers)}"
        found: dict[str, float] = self.work.read(name) or {}
        wanted = linears(self.model, towers)
        if self.recipe.score == "fo":
            task = self.progress.add_task("scores (fo)", total=len(self.samples))
            found = found or scores.first_order(self.model, wanted, self.samples, lambda: self.progress.advance(task))
            self.work.write(name, found)
            return found
        task = self.progress.add_task("scores (zo)", total=len(wanted), completed=len(found))
        for matrix, score in scores.zeroth_order(self.model, towers, self.samples, self.recipe.seed, known=list(found)):
            found[matrix] = score
            self.work.write(name, found)
            self.progress.advance(task)
        return found

    def _outliers(self, towers: list[str]) -> dict[str, float]:
        """OWL's outliers in each matrix, on dense activations."""
        name = f"outliers-{'-'.join(towers)}"
        found: dict[str, float] = self.work.read(name) or {}
        if found:
            return found
        for tower in towers:
            for block, calls in walk(self.model, tower, self.samples, self.recipe.visual_weight):
                for group, norms in zip(block.groups, collect(block, calls, wanda.empty, wanda.accumulate), strict=True):
                    for short in group:
                        found[f"{block.name}.{short}"] = scores.outliers(block.linear(short).weight, norms.squares)
        self.work.write(name, found)
        return found

    def _prune(self, tower: str, kept: Kept) -> None:
        """Prune a tower block by block, each on what the pruned ones before it put out."""
        recipe = self.recipe
        task = self.progress.add_task(f"{tower} blocks", total=len(blocks(self.model, tower)))
        dense = first_calls(self.model, tower, self.samples) if recipe.reconstruct else []
        for block, calls in walk(self.model, tower, self.samples, recipe.visual_weight):
            wanted = []
            for call in dense:
                with torch.no_grad():
                    call.hidden = call.run(block)
                wanted.append(call.hidden)
            name = f"block-{block.name}"
            stored = self.work.read_tensors(name)
            if stored is None:
                record = self._prune_block(block, calls, kept, wanted)
                self.work.write_tensors(name, {n: linear.weight for n, linear in block.linears().items()}, record)
            else:
                tensors, record = stored
                _write(block, tensors)
            self.report["damping"] |= record["damping"]
            self.report["reconstruction"] |= record["reconstruction"]
            self.progress.advance(task)

    def _cut(self, tower: str) -> None:
        """Cut a tower's heads and neurons. Units are whole: what a block loses too much or too little, the next one makes up."""
        recipe = self.recipe
        sparsity = recipe.vision_sparsity if tower == "vision" else recipe.sparsity
        task = self.progress.add_task(f"{tower} blocks", total=len(blocks(self.model, tower)))
        stored = self.work.read(f"widths-{tower}")
        uniform = LayerShape(**stored) if stored else None
        if recipe.uniform_width and not uniform:
            config = getattr(self.model.config, "vision_config" if tower == "vision" else "text_config")
            dense = walk(self.model, tower, self.samples, recipe.visual_weight)
            uniform = structured.uniform_widths(config, dense, recipe.criterion, sparsity, recipe.damping)
            self.work.write(f"widths-{tower}", asdict(uniform))
        owed = 0.0
        for block, calls in walk(self.model, tower, self.samples, recipe.visual_weight):
            owed += structured.weights(block) * (1 - sparsity)
            name = f"block-{block.name}"
            stored = self.work.read_tensors(name)
            if stored is None:
                cut = structured.prune_block(block, calls, recipe.criterion, uniform or round(owed), recipe.damping)
                record = {"widths": asdict(cut.widths), "damping": cut.damping}
                self.work.write_tensors(name, structured.tensors(block), record)
            else:
                tensors, record = stored
                structured.restore(block, LayerShape(**record["widths"]), tensors)
            owed -= structured.weights(block)
            self.report["damping"] |= record["damping"]
            self.report["notes"].setdefault("widths", {})[block.name] = record["widths"]
            self.progress.advance(task)

    def _prune_block(self, block: Block, calls: list[Any], kept: Kept, wanted: list[Tensor]) -> dict[str, Any]:
        recipe = self.recipe
        if not any(count < block.linears()[name].weight.numel() for name, count in kept.items() if name in block.linears()):
            return {"damping": {}, "reconstruction": {}}
        counts = {name: [kept[name]] for name in block.linears()}
        solved, damping = solve_block(block, calls, self.method, counts, recipe.parsed)
        _write(block, {name: weights[0] for name, weights in solved.items()})
        errors = {}
        if wanted:
            errors[block.name] = reconstruct(block, calls, wanted, recipe.reconstruct, f"{recipe.seed}/{block.name}")
        return {"damping": damping, "reconstruction": errors}


@torch.no_grad()
def _write(block: Block, weights: dict[str, Tensor]) -> None:
    for name, linear in block.linears().items():
        linear.weight.copy_(weights[name])
