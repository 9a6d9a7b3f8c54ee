"""`espalier finetune`: train a checkpoint further, with every weight that is zero left zero.

What is added to a matrix has a low rank (LoRA, Hu et al. 2021, arXiv 2106.09685) and the matrix's own zeros: W = W₀ + M ⊙ BA, where
M is 1 where W₀ is not zero. It is merged into the weights, so that masks of any pattern survive and nothing is loaded beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite, pi, sin
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.checkpoint import TransformersCheckpoint, check_files, open_transformers
from models.manifest import Manifest, read_manifest
from models.run_state import RunState
from models.saving import derive
from pruning import layer_importance, samples
from pruning.finetuning.config import FinetuneConfig
from pruning.finetuning.levels import shown
from pruning.progress import progress_bar, tell_resumed
from pruning.static import held_out
from pruning.static.blocks import linears
from pruning.static.fitness import answer_rows, divergence, embedded, image_features
from pruning.static.packing import PackedSample, pack
from pruning.static.pipeline import check_out
from pruning.static.scores import cross_entropy

SAVE_EVERY = 20
"""Steps."""
CALIBRATION_SAMPLES = 64


class FinetuneError(ValueError):
    """The run cannot begin or go on; the message says what to do."""


def run(
    config: FinetuneConfig, checkpoint: Path, out: Path, teacher: Path | None = None, device: str = "cpu", dtype: str = "auto",
    quiet: bool = False,
) -> Manifest:  # fmt: skip
    """Train `checkpoint` into the directory `out` and return its manifest: on the answers of the data or, with a `teacher`, to give
    each of their tokens the probabilities that the teacher gives.

    Errors of the options, the data, the place and the checkpoints come before the work: FinetuneError, DataError, RecipeError,
    CheckpointError. A run that ends early goes on when it is started again: its last save waits in `out`.work.
    """
    _check(config, checkpoint, out)
    config = config.model_copy(update={"data": samples.choose(config.data, checkpoint)})
    samples.check(config.data, config.samples, config.seed)
    rest = samples.read_rest(
        config.data, held_out.PICTURES, config.samples, config.seed, earlier=_earlier(config.data, read_manifest(checkpoint))
    )
    console = Console(stderr=True, quiet=quiet)
    run_state = _draft(config, checkpoint, out, teacher, device, dtype, console)
    calibrated = min(CALIBRATION_SAMPLES, config.samples)
    layer_importance.calibrate(run_state.draft, config.data, calibrated, config.seed, device, quiet=quiet)
    if teacher and read_manifest(run_state.draft).pruning:
        held_out.measure(teacher, run_state, rest, config.seed, device, dtype, console)
    run_state.complete()
    return read_manifest(out)


def _check(config: FinetuneConfig, checkpoint: Path, out: Path) -> None:
    check_files(checkpoint)
    check_out(out)
    if not config.steps:
        raise FinetuneError(f"{config.samples} samples fill no batch of {config.batch_size}; take more, or a smaller batch")


def _earlier(data: str, manifest: Manifest) -> list[tuple[int, int]]:
    """(count, seed) of all samples of this data that a checkpoint was pruned and trained on."""
    runs = _finetunings(manifest) + ([manifest.pruning.recipe | {"epochs": 1}] if manifest.pruning else [])
    same = [run for run in runs if samples.same(run["data"], data)]
    return sorted({(run["samples"], seed) for run in same for seed in _seeds(data, run["seed"], run["epochs"])})


def _finetunings(manifest: Manifest) -> list[dict[str, Any]]:
    """What a checkpoint was trained further on, run by run, the last at the end."""
    last = manifest.finetuning
    return [*last.get("earlier", []), {key: last[key] for key in ("data", "samples", "seed", "epochs")}] if last else []


def _seeds(data: str, seed: int, epochs: int) -> list[int]:
    """By which the samples of each epoch are read: drawings are new each time, pictures of a file the same, the others held out."""
    return [seed + epoch if data in samples.FAMILIES else seed for epoch in range(epochs)]


def _draft(
    config: FinetuneConfig, directory: Path, out: Path, teacher: Path | None, device: str, dtype: str, console: Console
) -> RunState:
    """Write the draft of the new checkpoint."""
    source = open_transformers(directory, device, dtype)
    taught = open_transformers(teacher, device, str(source.model.dtype).removeprefix("torch.")) if teacher else None
    if taught and not _same_head(source.model, taught.model):
        raise FinetuneError(f"{teacher} has another head than {directory}; the teacher is the checkpoint that it was pruned from")
    names = [f"{one.name} {one.fingerprint}" for one in (source, taught) if one]
    run_state = RunState(out, config.model_dump(mode="json"), f"{' '.join(names)} {dtype} {samples.content(config.data)}")
    tell_resumed(run_state, console)
    if run_state.draft.exists():
        return run_state
    finetuning = Finetuning(config, source, taught.model if taught else None, run_state)
    losses = finetuning.train(console)
    record = {
        **config.model_dump(mode="json"), "source": names[0], "teacher": names[1] if taught else None, "loss": losses,
        "earlier": _finetunings(source.manifest),
    }  # fmt: skip
    pruning = source.manifest.pruning
    manifest = source.manifest.derive(
        calibration=None, finetuning=record, pruning=pruning and pruning.model_copy(update={"held_out": None})
    )
    changed = {f"{name}.weight": update.linear.weight for name, update in finetuning.updates.items()}
    derive(source.directory, run_state.draft, changed, manifest)
    return run_state


def _same_head(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether what one model gives to its head means the same to the other's."""
    return torch.equal(one.get_output_embeddings().weight, other.get_output_embeddings().weight)


@dataclass(frozen=True)
class LowRankUpdate:
    """What is added to a matrix `base` [out, in] where that is not zero: `up` [out, rank] times `down` [rank, in], in float32."""

    linear: nn.Linear
    base: Tensor
    up: nn.Parameter
    down: nn.Parameter

    @classmethod
    def of(cls, linear: nn.Linear, rank: int, generator: torch.Generator) -> LowRankUpdate:
        device, base = linear.weight.device, linear.weight.detach().clone()
        down = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        linear.weight.requires_grad_(True)
        return cls(linear, base, nn.Parameter(torch.zeros(linear.out_features, rank, device=device)), nn.Parameter(down.to(device)))

    @torch.no_grad()
    def merge(self) -> None:
        """Write the sum into the model."""
        self.linear.weight.copy_(self.base + (self.up @ self.down).masked_fill_(self.base == 0, 0))

    @torch.no_grad()
    def take_gradient(self) -> None:
        """Of the merged weight, whose gradient is let go."""
        assert self.linear.weight.grad is not None
        gradient = self.linear.weight.grad.float().masked_fill_(self.base == 0, 0)
        self.up.grad, self.down.grad = gradient @ self.down.T, self.up.T @ gradient
        self.linear.weight.grad = None


class Finetuning:
    """One run's model, what is added to its matrices, and the optimizer."""

    def __init__(
        self, config: FinetuneConfig, source: TransformersCheckpoint, teacher: PreTrainedModel | None, run_state: RunState
    ) -> None:
        self.config, self.model, self.teacher, self.run_state = config, source.model, teacher, run_state
        self.preprocessor = source.preprocessor
        self.model.requires_grad_(False)
        generator = torch.Generator().manual_seed(config.seed)
        self.updates = {
            name: LowRankUpdate.of(linear, config.rank, generator) for name, linear in _trained(self.model).items()
        }
        parameters = [part for update in self.updates.values() for part in (update.up, update.down)]
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
        self.losses: list[float] = []
        self._restore()

    def train(self, console: Console) -> list[float]:
        """Returns the mean loss of each tenth of the steps, or of each step where there are fewer than ten."""
        with progress_bar(console) as progress:
            task = progress.add_task("finetune", total=self.config.steps, completed=len(self.losses))
            for batch in islice(self._batches(), len(self.losses), None):
                self.losses.append(self._step([pack(self.preprocessor, sample) for sample in batch]))
                recent = self.losses[-SAVE_EVERY:]
                progress.update(task, advance=1, description=f"finetune, loss {sum(recent) / len(recent):.4f}")
                if len(self.losses) % SAVE_EVERY == 0:
                    self._save()
        return tenths(self.losses)

    def _batches(self) -> Iterator[list[samples.Sample]]:
        config = self.config
        for seed in _seeds(config.data, config.seed, config.epochs):
            read = samples.read(config.data, config.samples, seed)
            while len(batch := list(islice(read, config.batch_size))) == config.batch_size:
                yield batch

    def _step(self, batch: Sequence[PackedSample]) -> float:
        total = 0.0
        # One at a time: its activations are most of the memory.
        for number, sample in enumerate(batch, len(self.losses) * len(batch)):
            loss = self._loss(sample, self.config.levels[number % len(self.config.levels)]) / len(batch)
            loss.backward()
            total += float(loss.detach())
        for update in self.updates.values():
            update.take_gradient()
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _schedule(len(self.losses), self.config.steps)
        self.optimizer.step()
        for update in self.updates.values():
            update.merge()
        # Before it is saved: a run that goes on would do so from weights that are lost.
        if not (isfinite(total) and all(update.linear.weight.isfinite().all() for update in self.updates.values())):
            step = len(self.losses) + 1
            raise FinetuneError(f"loss or weights are not finite at step {step}; lower --learning-rate, or use --dtype float32")
        return total

    def _loss(self, sample: PackedSample, level: str) -> Tensor:
        given = shown(self.model, sample, image_features(self.model, sample), level)
        found = answer_rows(self.model, given.inputs, given.before_answers)
        if self.teacher is None:
            return cross_entropy(self.model.lm_head(found), sample)
        with torch.no_grad():  # its own features: `prune --tower` changes what the student sees
            inputs = embedded(self.teacher, sample, image_features(self.teacher, sample))
            dense = answer_rows(self.teacher, inputs, sample.before_answers)
        return divergence(self.model, dense, found)

    def _save(self) -> None:
        optimizer = self.optimizer.state_dict()
        moments = {f"{number}/{key}": value for number, state in optimizer["state"].items() for key, value in state.items()}
        parts = {f"{name}/{part}": getattr(update, part) for name, update in self.updates.items() for part in ("up", "down")}
        record = {"losses": self.losses, "groups": optimizer["param_groups"]}
        self.run_state.write_tensors("training", parts | moments, record)

    @torch.no_grad()
    def _restore(self) -> None:
        saved = self.run_state.read_tensors("training")
        if saved is None:
            return
        tensors, record = saved
        state: dict[int, dict[str, Tensor]] = {}
        for name, update in self.updates.items():
            update.up.copy_(tensors.pop(f"{name}/up"))
            update.down.copy_(tensors.pop(f"{name}/down"))
            update.merge()
        for key, value in tensors.items():
            number, _, moment = key.partition("/")
            state.setdefault(int(number), {})[moment] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": record["groups"]})
        self.losses = record["losses"]


def _schedule(step: int, steps: int) -> float:
    """Share of the highest learning rate: a tenth of the steps up and the others down, both along a cosine. However few there are,
    each learns, and one of them at the highest."""
    rising = max(1, steps // 10)
    return sin(pi / 2 * min((step + 1) / rising, (steps - step) / (steps - rising + 1))) ** 2


def tenths(losses: Sequence[float]) -> list[float]:
    """The mean of each tenth of the losses; of fewer than ten, themselves."""
    return [round(float(part.mean()), 5) for part in np.array_split(losses, min(10, len(losses)))]


def _trained(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The matrices that learn, by plain name: those that `espalier prune` prunes, and the projector's."""
    projector: dict[str, Any] = dict(model.model.multi_modal_projector.named_modules())
    return linears(model) | {f"projector.{name}": part for name, part in projector.items() if isinstance(part, nn.Linear)}
