"""`espalier quantize`: a checkpoint in 4 bits, its language model rounded by what calibration samples put into each matrix."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from models.checkpoint import TransformersCheckpoint, check_files, open_transformers, weight_bytes
from models.manifest import HeldOut, Manifest, Quantization, read_manifest, write_manifest
from models.quantized import bitsandbytes, nf4_config, stored_nf4
from models.run_state import RunState
from models.saving import derive, plain_name
from pruning import samples
from pruning.progress import progress_bar, tell_resumed
from pruning.static import gptq, held_out
from pruning.static.blocks import Block, BlockInput, blocks, sequential
from pruning.static.criteria import for_each_matrix
from pruning.static.packing import PackedSample, pack
from pruning.static.pipeline import check_out, check_room

QUANTIZED = re.compile(r"(language|vision)\.\d+\.(self_attn|mlp)\.|projector\.")
"""Plain names of matrices that are held in 4 bits. A convolutional tower has none of them, and the pooling head of a tower is not
used."""


def run(
    checkpoint: Path, out: Path, data: str | None = None, count: int = 64, seed: int = 0, device: str = "cpu", dtype: str = "auto",
    quiet: bool = False,
) -> Manifest:  # fmt: skip
    """Write `checkpoint` to the directory `out` in NF4, in bitsandbytes' format, and measure what that cost. Returns its manifest.

    The language model's matrices are rounded by GPTQ on `count` samples of `data`, block by block, each on what the rounded ones
    before it put out, in `dtype`. Tower and projector are rounded to nearest; embedding and head stay. A router stays as well.

    Errors of the data, the checkpoint and the disk come before the work (RecipeError, DataError, CheckpointError); errors of the
    statistics name the matrix. A run that ends early goes on when it is started again: its finished blocks wait in `out`.work.
    """
    check_out(out)
    check_files(checkpoint)
    bitsandbytes()
    check_room(out, 2 * weight_bytes(checkpoint))
    data = samples.choose(data, checkpoint)
    samples.check(data, count, seed)
    console = Console(stderr=True, quiet=quiet)
    rest = samples.read_rest(data, held_out.PICTURES, count, seed)
    run_state = _draft(checkpoint, out, data, count, seed, device, dtype, console)
    cost = held_out.cost(checkpoint, run_state, rest, seed, device, "auto", console)
    _complete(run_state.draft, checkpoint, cost)
    run_state.complete()
    return read_manifest(out)


def _draft(
    checkpoint: Path, out: Path, data: str, count: int, seed: int, device: str, dtype: str, console: Console
) -> RunState:
    """Write the draft of the new checkpoint. The model is let go on return."""
    source = open_transformers(checkpoint, device, dtype)
    source.model.requires_grad_(False)
    packed = [pack(source.preprocessor, sample) for sample in samples.read(data, count, seed)]
    recipe = {"quantize": "nf4", "data": data, "samples": count, "seed": seed}
    run_state = RunState(out, recipe, f"{source.name} {source.fingerprint} {dtype} {samples.content(data)}")
    tell_resumed(run_state, console)
    if run_state.draft.exists():  # stopped while what it cost was measured
        return run_state
    with progress_bar(console) as progress:
        rounded, damping = round_blocks(source.model, packed, run_state, progress)
    about = Quantization(
        source=source.name, fingerprint=source.fingerprint, data=data, samples=count, seed=seed, damping=damping
    )
    _write(source, run_state.draft, rounded, about)
    return run_state


def round_blocks(
    model: PreTrainedModel, packed: list[PackedSample], run_state: RunState, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Round the language model's blocks, in place. Returns their weights by plain name, and the dampings that were raised."""
    task = progress.add_task("blocks", total=len(blocks(model)))
    rounded: dict[str, Tensor] = {}
    dampings: dict[str, float] = {}
    for block, inputs in sequential(model, packed):
        stored = run_state.read_tensors(f"block-{block.name}")
        if stored is None:
            weights, damping = _rounded(block, inputs)
            run_state.write_tensors(f"block-{block.name}", weights, {"damping": damping})
        else:
            weights, damping = stored[0], stored[1]["damping"]
        for name, linear in block.linears().items():
            linear.weight.copy_(weights[name])
            rounded[f"{name}.weight"] = linear.weight
        dampings |= damping
        progress.advance(task)
    return rounded, dampings


def _rounded(block: Block, inputs: list[BlockInput]) -> tuple[dict[str, Tensor], dict[str, float]]:
    weights: dict[str, Tensor] = {}

    def keep(name: str, weight: Tensor, factor: gptq.OrderedFactor) -> None:
        weights[name] = gptq.round_nf4(weight, factor)

    damping = for_each_matrix(block, inputs, gptq, keep)
    return weights, damping


def _write(source: TransformersCheckpoint, draft: Path, rounded: dict[str, Tensor], about: Quantization) -> None:
    modules = [name for name, module in source.model.named_modules() if type(module) is nn.Linear]
    names = {name: plain_name(f"{name}.weight") for name in modules}
    quantized = {name for name in names.values() if QUANTIZED.match(name)}

    def stored(key: str, tensor: Tensor) -> dict[str, Tensor]:
        return stored_nf4(key, tensor) if plain_name(key) in quantized else {key: tensor}

    skipped = [module for module, name in names.items() if name not in quantized]
    dtype = AutoConfig.from_pretrained(source.directory).dtype or source.model.dtype
    config = {"quantization_config": nf4_config(dtype, skipped)}
    derive(source.directory, draft, rounded, source.manifest.derive(quantization=about), config, stored)


def _complete(draft: Path, checkpoint: Path, cost: HeldOut | None) -> None:
    """Write what rounding cost into the manifest, and copy the dense checkpoint's router, which holds for this one too."""
    dense, manifest = read_manifest(checkpoint), read_manifest(draft)
    assert manifest.quantization
    for name in dense.files.keys() - manifest.files.keys():
        shutil.copyfile(checkpoint / name, draft / name)
        manifest.files[name] = dense.files[name]
    quantization = manifest.quantization.model_copy(update={"held_out": cost})
    write_manifest(draft, manifest.model_copy(update={"quantization": quantization, "router": dense.router}))
