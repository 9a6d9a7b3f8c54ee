"""`espalier route`: a router trained for a checkpoint, from pictures and questions alone.

The un-pruned model is asked (`dataset`). The router learns to predict its attention and the costs of freezing layers (`loop`), and
to correct merged tokens (`distill`). On held-out pictures the agreement head and the levels' cost weights are found (`profile`).
Each part is kept on disk as it is finished, and a run that was stopped goes on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from models.checkpoint import Checkpoint, fingerprint, load, open_transformers, sha256, weight_files
from models.manifest import Manifest, read_manifest, write_manifest
from models.run_state import RunState
from models.saving import derive
from pruning import samples
from pruning.dynamic.router import Router, RouterConfig, default_width
from pruning.dynamic.router_file import FILE, save_router
from pruning.dynamic.training.config import TrainingConfig
from pruning.dynamic.training.dataset import RouterDataset, collect
from pruning.dynamic.training.distill import distillation_loss
from pruning.dynamic.training.loop import score, score_loss, train
from pruning.dynamic.training.profile import grid, profile
from pruning.progress import progress_bar, tell_resumed


def run(
    config: TrainingConfig, checkpoint: Path, out: Path, device: str = "cpu", dtype: str = "auto", quiet: bool = False
) -> Manifest:
    """Train a router for `checkpoint` and write both to the directory `out`. Returns its manifest.

    Raises CheckpointError, DataError and ValueError before the work; a run that ends early goes on when it is started again.
    """
    if out.exists():
        raise ValueError(f"{out} exists; name a directory that does not, or remove it")
    config = config.model_copy(update={"data": samples.choose(config.data, checkpoint)})
    samples.check(config.data, config.pictures, config.picture_seed, answered=False)
    source = load(checkpoint, device, dtype)
    if source.quantization:
        raise ValueError(f"{checkpoint} holds {source.quantization} weights; train the router on the dense checkpoint")
    if source.preprocessor.tiled:
        raise ValueError(f"{checkpoint}: a router reads pictures of one tile; without one, levels merge tokens of all tiles")
    # The calibration decides which layers operating points skip, and how many points there are.
    identity = f"{source.name} {source.fingerprint} {source.manifest.layer_change}"
    state = RunState(out, config.model_dump(), f"{identity} {dtype} {samples.content(config.data)}")
    console = Console(stderr=True, quiet=quiet)
    tell_resumed(state, console)
    with progress_bar(console) as progress:
        data = collect(config, source, state, progress)
        router = teach(config, source, (device, dtype), data, state, progress)
        record = profile(config, source, router, data, state, progress)
    draft = state.draft
    shutil.rmtree(draft, ignore_errors=True)
    derive(source.directory, draft, {}, source.manifest.derive())
    save_router(router, draft / FILE)
    files = read_manifest(draft).files | {FILE: sha256(draft / FILE)}
    # The weights are the same, their files need not be: some have headers of their own.
    record = record.model_copy(update={"checkpoint": "fp_" + fingerprint(weight_files(draft))})
    write_manifest(draft, source.manifest.derive(router=record.model_dump(), files=files))
    state.complete()
    return read_manifest(out)


def teach(
    config: TrainingConfig, source: Checkpoint, place: tuple[str, str], data: RouterDataset, state: RunState, progress: Progress
) -> Router:
    """Train the scores, then the corrector. The latter runs through transformers' model, which is loaded for it and let go."""
    torch.manual_seed(config.seed)
    model, width = source.model, data.visual.shape[-1]
    shape = RouterConfig(width, model.num_layers, config.width or default_width(width), operating_points=len(grid(source)) - 1)
    router = Router(shape).to(model.device)

    def scores(step: int, drawn: RouterDataset) -> Tensor:
        return score_loss(score(router, model.embed, drawn))

    train("scores", router, data, config, config.steps, config.learning_rate, scores, state, progress)
    if config.corrector_steps:
        teacher = open_transformers(source.directory, *place).model.requires_grad_(False)
        # On CPU the backward pass of the fused attention costs more than all the rest.
        teacher.set_attn_implementation("eager" if model.device.type == "cpu" else "sdpa")

        def correction(step: int, drawn: RouterDataset) -> Tensor:
            return distillation_loss(router, teacher, drawn, config.seed * 1_000_003 + step)

        steps, rate = config.corrector_steps, config.corrector_learning_rate
        train("corrector", router.corrector, data, config, steps, rate, correction, state, progress)
    return router.requires_grad_(False).eval()
