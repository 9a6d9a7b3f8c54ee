"""`espalier prune`: a recipe carried out, from a dense checkpoint to a pruned one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel

from models.checkpoint import check_files, open_transformers
from models.layer_shapes import LayerShape
from models.manifest import Manifest, Pruning, read_manifest
from models.run_state import RunState, run_directory
from models.saving import derive
from pruning import layer_importance, samples
from pruning.progress import progress_bar, tell_resumed
from pruning.static import allocation, held_out, plan, scores, search, structured, wanda
from pruning.static.allocation import Allocation
from pruning.static.blocks import Block, BlockInput, blocks, input_statistics, linears, sequential
from pruning.static.compressed import compress, decompress
from pruning.static.criteria import CRITERIA, pruned_weights
from pruning.static.database import Database, PolicyLoader
from pruning.static.evaluate import connect
from pruning.static.fitness import Divergence
from pruning.static.masks import GROUP, Pattern
from pruning.static.packing import PackedSample, pack
from pruning.static.recipe import Recipe, RecipeError


def run(
    recipe: Recipe, checkpoint: Path, out: Path, device: str = "cpu", dtype: str = "auto", ray: str | None = None,
    quiet: bool = False,
) -> Manifest:  # fmt: skip
    """Prune `checkpoint` into the directory `out`, and measure how much each layer of the result does and what pruning cost.
    Returns its manifest.

    Statistics and search run in `dtype`; the files keep theirs.

    Errors of the recipe, the data, the checkpoint and the disk come before the work (RecipeError, DataError, CheckpointError);
    errors of the statistics name the matrix. A run that ends early goes on when it is started again: its finished parts wait in
    `out`.work.
    """
    check(recipe, checkpoint, out, dtype)
    recipe = recipe.model_copy(update={"data": samples.choose(recipe.data, checkpoint)})
    samples.check(recipe.data, recipe.samples, recipe.seed)
    if ray:
        if recipe.allocation != "search":
            raise RecipeError("--ray spreads the evaluations of a search: it needs allocation search")
        connect(ray)
    console = Console(stderr=True, quiet=quiet)
    rest = samples.read_rest(recipe.data, held_out.PICTURES, recipe.samples, recipe.seed, recipe.families)
    run_state = _draft(recipe, checkpoint, out, device, dtype, ray, console)
    layer_importance.calibrate(run_state.draft, recipe.data, recipe.samples, recipe.seed, device, "auto", quiet, recipe.families)
    held_out.measure(checkpoint, run_state, rest, recipe.seed, device, dtype, console)
    run_state.complete()
    return read_manifest(out)


def check(recipe: Recipe, directory: Path, out: Path, dtype: str) -> None:
    """All that can be known before the work. Raises RecipeError and CheckpointError."""
    check_files(directory)
    if read_manifest(directory).pruning:
        raise RecipeError(f"{directory} is pruned already; prune the dense checkpoint that it was made from")
    check_out(out)
    known = samples.FAMILIES.get(samples.choose(recipe.data, directory), ())
    if unknown := set(recipe.families) - set(known):
        raise RecipeError(f"families: {', '.join(sorted(unknown))} is not one of {', '.join(known) or 'any: the data has none'}")
    if recipe.tower and not plan.matrix_weights(directory)["vision"]:
        raise RecipeError(f"tower: {directory} has no vision transformer, whose heads and neurons could go; leave tower out")
    check_room(out, plan.disk(recipe, directory, dtype).most)


def check_out(out: Path) -> None:
    """Raises RecipeError where a directory cannot be made."""
    if out.exists():
        raise RecipeError(f"{out} exists; name a directory that does not, or remove it")
    if not out.parent.is_dir():
        raise RecipeError(f"{out.parent} is not a directory; create it first")


def check_room(out: Path, needed: int) -> None:
    """Raises RecipeError where the disk has not so many bytes, those of an unfinished run counted."""
    there = sum(path.stat().st_size for path in run_directory(out).rglob("*") if path.is_file())
    free = shutil.disk_usage(out.parent).free
    if free < needed - there:
        raise RecipeError(
            f"{out.parent} has {free / 1e9:.1f} GB free and up to {(needed - there) / 1e9:.1f} GB are needed; make room"
        )


def _draft(recipe: Recipe, directory: Path, out: Path, device: str, dtype: str, ray: str | None, console: Console) -> RunState:
    """Write the draft of the new checkpoint. The model is let go on return: what comes after needs the room for the new one."""
    source = open_transformers(directory, device, dtype)
    source.model.requires_grad_(False)
    identity = f"{source.name} {source.fingerprint}"
    read = samples.read(recipe.data, recipe.samples, recipe.seed, families=recipe.families)
    packed = [pack(source.preprocessor, sample) for sample in read]
    run_state = RunState(out, recipe.model_dump(mode="json"), f"{identity} {dtype} {samples.content(recipe.data)}")
    tell_resumed(run_state, console)
    if run_state.draft.exists():  # stopped while it was completed
        return run_state
    if not run_state.resumed:
        size, needed = plan.disk(recipe, directory, dtype), plan.memory(recipe, source.model, packed, directory)
        console.print(plan.told(size, needed, plan.seconds(recipe, source.model, packed, size)), highlight=False)
    with progress_bar(console) as progress:
        changed, report = PruningRun(recipe, source.model, packed, run_state, progress, source.directory, ray).run()
    pruning = Pruning(recipe=recipe.model_dump(mode="json"), source=identity, **report)
    # What was measured on the dense checkpoint does not hold for this one.
    manifest = source.manifest.derive(pruning=pruning, calibration=None)
    derive(source.directory, run_state.draft, changed, manifest, structured.update_config(source.model))
    return run_state


class PruningRun:
    """One run's model, samples and finished parts."""

    def __init__(
        self, recipe: Recipe, model: PreTrainedModel, samples: list[PackedSample], run_state: RunState,
        progress: Progress, checkpoint: Path, ray: str | None,
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.samples, self.run_state, self.progress = recipe, model, samples, run_state, progress
        self.checkpoint, self.ray = checkpoint, ray
        self.report: dict[str, Any] = {"damping": {}, "notes": {}}

    def run(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors that changed, by plain name, and the manifest's record."""
        shares = self.recipe.shares
        sizes = {name: linear.weight.numel() for name, linear in linears(self.model, shares).items()}
        if self.recipe.pattern == "structured":
            for module, share in shares.items():
                self._prune_structured(module, share)
        elif self.recipe.allocation == "search":
            self._search()
        else:
            self._prune(self._allocate(sizes))
        nonzeros = {name: int(linear.weight.count_nonzero()) for name, linear in linears(self.model, shares).items()}
        self.report["sparsity"] = {name: round(1 - nonzeros[name] / size, 6) for name, size in sizes.items()}
        pruned = [block for module in shares for block in blocks(self.model, module)]
        changed = {name: tensor for block in pruned for name, tensor in structured.tensors(block).items()}
        if self.recipe.allocation == "search":
            changed |= {f"projector.{key}": value for key, value in self.model.model.multi_modal_projector.state_dict().items()}
        return changed, self.report

    def _allocate(self, sizes: Mapping[str, int]) -> Allocation:
        recipe = self.recipe
        if recipe.pattern == "2:4":
            for name, linear in linears(self.model).items():
                if linear.in_features % GROUP:
                    raise RecipeError(f"pattern 2:4: {name} has rows of {linear.in_features}, no multiple of {GROUP}")
            return {name: size // 2 for name, size in sizes.items()}
        if recipe.allocation == "ecoflap":
            return allocation.ecoflap(sizes, self._scores(), recipe.sparsity)
        if recipe.allocation == "owl":
            return allocation.owl(sizes, self._outlier_ratios(), recipe.sparsity)
        return allocation.uniform(sizes, recipe.sparsity)

    def _scores(self) -> dict[str, float]:
        """ECoFLaP's score of each matrix; those of zeroth order are kept one by one, for they take long."""
        found: dict[str, float] = self.run_state.read("scores") or {}
        if self.recipe.score == "fo":
            task = self.progress.add_task("scores (fo)", total=len(self.samples))
            found = found or scores.first_order(self.model, self.samples, lambda: self.progress.advance(task))
            self.run_state.write("scores", found)
            return found
        task = self.progress.add_task("scores (zo)", total=len(linears(self.model)), completed=len(found))
        for matrix, score in scores.zeroth_order(self.model, self.samples, self.recipe.seed, known=list(found)):
            found[matrix] = score
            self.run_state.write("scores", found)
            self.progress.advance(task)
        return found

    def _outlier_ratios(self) -> dict[str, float]:
        """OWL's share of outliers in each matrix, on dense activations."""
        found: dict[str, float] = self.run_state.read("outliers") or {}
        if found:
            return found
        for block, inputs in sequential(self.model, self.samples):
            for group, norms in zip(block.groups, input_statistics(block, inputs, wanda.empty, wanda.accumulate), strict=True):
                for short in group:
                    found[f"{block.name}.{short}"] = scores.outlier_ratio(block.linear(short).weight, norms.squares)
        self.run_state.write("outliers", found)
        return found

    def _search(self) -> None:
        """Search, prune in sequence at the ratios found, and keep those weights or the search's own, whichever are closer to dense.
        The others are removed from the disk before the result is written."""
        database = search.open_database(self.recipe, self.model, self.checkpoint, self.run_state)
        decision = self.run_state.read("decision") or self._decide(database)
        self.report = decision["report"]
        if tuned := self.run_state.read_tensors("projector"):
            self.model.model.multi_modal_projector.load_state_dict(tuned[0])
        if decision["policy"]:
            PolicyLoader(linears(self.model), database).load(tuple(decision["policy"]))
        else:
            shutil.rmtree(database.directory, ignore_errors=True)
        for block in blocks(self.model):
            if decision["policy"]:
                self.run_state.remove_tensors(_stored_name(block))
            elif stored := self.run_state.read_tensors(_stored_name(block)):
                _write(block, _decompressed(block, stored[0]))

    def _decide(self, database: Database) -> dict[str, Any]:
        """The search's report, and its policy if that is closer to dense than what is pruned in sequence."""
        divergence = Divergence.from_dense(self.model, self.samples)
        found = search.search(self.recipe, divergence, database, self.run_state, self.progress, self.checkpoint, self.ray)
        self.report |= {"search": found.history, "projector": found.projector}
        self._prune(found.allocation)
        both = self.report["notes"]["divergence"] = search.compare(divergence, database, found.policy)
        if keep_policy := not both["sequential"] <= both["database"]:
            self.report["damping"] = found.damping
        decision = {"report": self.report, "policy": found.policy if keep_policy else None}
        self.run_state.write("decision", decision)
        return decision

    def _prune(self, nonzeros: Allocation) -> None:
        """Prune block by block, each on what the pruned ones before it put out."""
        task = self.progress.add_task("blocks", total=len(blocks(self.model)))
        for block, inputs in sequential(self.model, self.samples):
            stored = self.run_state.read_tensors(_stored_name(block))
            if stored is None:
                damping = self._prune_block(block, inputs, nonzeros)
                self.run_state.write_tensors(_stored_name(block), _compressed(block), {"damping": damping})
            else:
                damping = stored[1]["damping"]
                _write(block, _decompressed(block, stored[0]))
            self.report["damping"] |= damping
            self.progress.advance(task)

    def _prune_block(self, block: Block, inputs: list[BlockInput], nonzeros: Allocation) -> dict[str, float]:
        """Returns the dampings that were raised."""
        counts = {name: [nonzeros[name]] for name in block.linears()}
        pattern: Pattern = "2:4" if self.recipe.pattern == "2:4" else "unstructured"
        pruned: dict[str, Tensor] = {}

        def keep(name: str, place: int, weight: Tensor) -> None:
            pruned[name] = weight

        damping = pruned_weights(block, inputs, CRITERIA[self.recipe.criterion], counts, pattern, keep)
        _write(block, pruned)
        return damping

    def _prune_structured(self, module: str, share: float) -> None:
        """Remove a share of a module's heads and neurons. They are whole: what a block loses too much or too little, the next one
        makes up."""
        task = self.progress.add_task(f"{module} blocks", total=len(blocks(self.model, module)))
        target = 0.0
        for block, inputs in sequential(self.model, self.samples, module):
            target += structured.weight_count(block) * (1 - share)
            stored = self.run_state.read_tensors(_stored_name(block))
            if stored is None:
                removals = structured.removals(block, inputs, self.recipe.criterion)
                shape = removals.cheapest(round(target))
                removals.apply(shape)
                record = {"shape": asdict(shape), "damping": removals.damping}
                self.run_state.write_tensors(_stored_name(block), structured.tensors(block), record)
            else:
                tensors, record = stored
                structured.restore(block, LayerShape(**record["shape"]), tensors)
            target -= structured.weight_count(block)
            self.report["damping"] |= record["damping"]
            self.report["notes"].setdefault("layer_shapes", {})[block.name] = record["shape"]
            self.progress.advance(task)


def _stored_name(block: Block) -> str:
    return f"block-{block.name}"


def _compressed(block: Block) -> dict[str, Tensor]:
    """A pruned block's weights as they are stored."""
    parts = {name: compress(linear.weight) for name, linear in block.linears().items()}
    return {f"{name}/{part}": tensor for name, held in parts.items() for part, tensor in held.items()}


def _decompressed(block: Block, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: decompress(stored[f"{name}/bits"], stored[f"{name}/values"], linear.weight.shape)
        for name, linear in block.linears().items()
    }


@torch.no_grad()
def _write(block: Block, weights: Mapping[str, Tensor]) -> None:
    for name, linear in block.linears().items():
        linear.weight.copy_(weights[name])
