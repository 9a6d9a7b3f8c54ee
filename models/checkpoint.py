"""The checkpoint format: what `transformers` loads, plus `espalier.json`, our manifest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from checkpoints.embedded import SHIPPED
from models.layer_shapes import SlicedLlava
from models.llava import Llava, check_supported, from_transformers, visual_tokens_per_image
from models.preprocess import Preprocessor

MANIFEST = "espalier.json"
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CheckpointError(Exception):
    """The checkpoint cannot be loaded; the message names the file or key at fault and what to do."""


class Calibration(BaseModel):
    """How much each layer changes the hidden state, and on what that was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer_change: list[float] = Field(description="1 - cosine between a layer's input and output, mean over rows.")
    data: str
    samples: int
    seed: int


class Pruning(BaseModel):
    """How the weights were pruned, and what came of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any] = Field(description="Every setting, by the names of `espalier prune`.")
    source: str = Field(description="Name and fingerprint of the dense checkpoint.")
    sparsity: dict[str, float] = Field(description="Share of zeros, or of weights removed, by matrix.")
    damping: dict[str, float] = Field(default_factory=dict, description="Where a Hessian needed more than was asked for.")
    reconstruction: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="Relative error of a block's output before and after its reconstruction."
    )
    search: list[dict[str, float]] = Field(default_factory=list, description="The best policy of each generation.")
    projector: list[dict[str, Any]] = Field(default_factory=list, description="Held-out divergence before and after each tuning.")
    notes: dict[str, Any] = Field(default_factory=dict, description="What else was decided on the way.")


class RouterRecord(BaseModel):
    """The router beside the weights: what it is, for which of them, and how it was trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: dict[str, int]
    checkpoint: str = Field(description="Fingerprint of the weights that it was trained for.")
    lesson: dict[str, Any] = Field(description="Every setting, by the names of `espalier route`.")
    report: dict[str, Any] = Field(description="How well it foresees on held-out pictures.")
    rungs: list[dict[str, Any]] = Field(
        description="What it chooses from: visual_ratio, skipped_layers, passed_layers and cost; the whole model last."
    )
    levels: dict[str, dict[str, float]] = Field(
        description="Each level's price of arithmetic, and what that makes of held-out questions on average."
    )
    trade: dict[str, list[dict[str, float]]] = Field(
        description="The same for many prices, of rungs that leave out tokens alone and of all."
    )
    measured: dict[str, Any] = Field(
        description="On held-out questions: the agreement of each rung, and of each share of what is written that may be believed."
    )
    auto: dict[str, Any] = Field(
        description="The highest prices that surely keep the target share of answers, first in a chat and later, and what they buy."
    )


class Manifest(BaseModel):
    """`espalier.json`. Everything in it is optional: a checkpoint without one serves, with tokens as its only saving."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = Field(default=1, ge=1, le=1)
    base_model: str | None = None
    calibration: Calibration | None = None
    pruning: Pruning | None = None
    router: RouterRecord | None = None
    cards: dict[str, dict[str, Any]] = Field(default_factory=dict, description="What each level was measured to do.")
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of the weight files.")

    @property
    def layer_change(self) -> list[float] | None:
        """How much each layer changes the hidden state, if that was measured."""
        return self.calibration.layer_change if self.calibration else None


@dataclass
class Checkpoint:
    directory: Path
    name: str
    model: Llava
    preprocessor: Preprocessor
    eos: frozenset[int]
    manifest: Manifest
    fingerprint: str


def resolve(checkpoint: str | Path) -> Path:
    """A directory, or one of the names `embedded` and `embedded-dense` of the checkpoints that ship with Espalier."""
    if str(checkpoint) in SHIPPED:
        return SHIPPED[str(checkpoint)]
    path = Path(checkpoint)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; name one that holds a LLaVA checkpoint, or one of {', '.join(SHIPPED)}")
    return path


def read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not path.exists():
        return Manifest()
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the document"
        raise CheckpointError(f"{path}: {key}: {first['msg']}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    part = directory / (MANIFEST + ".part")
    part.write_text(json.dumps(manifest.model_dump(exclude_none=True), indent=1) + "\n")
    part.replace(directory / MANIFEST)


def load(checkpoint: str | Path, device: str = "cpu", dtype: str = "auto") -> Checkpoint:
    """Load a LLaVA checkpoint for our forward. `auto` is the dtype it was saved in.

    Raises CheckpointError for a missing or truncated file and UnsupportedCheckpoint for what the forward does not compute.
    """
    source = open_transformers(checkpoint, device, dtype)
    directory, manifest = source.directory, source.manifest
    eos = source.model.generation_config.eos_token_id
    if eos is None:
        eos = source.model.config.text_config.eos_token_id
    model = from_transformers(source.model)
    if manifest.calibration and len(manifest.calibration.layer_change) != model.num_layers:
        raise CheckpointError(
            f"{directory / MANIFEST}: calibration.layer_change has {len(manifest.calibration.layer_change)} values for "
            f"{model.num_layers} layers; remove `calibration` and run `espalier calibrate`"
        )
    return Checkpoint(
        directory=directory,
        name=source.name,
        model=model,
        preprocessor=source.preprocessor,
        eos=frozenset(eos if isinstance(eos, list) else [eos]),
        manifest=manifest,
        fingerprint=source.fingerprint,
    )


@dataclass
class Source:
    """A checkpoint as transformers holds it: what our forward takes its weights from, and what pruning works on."""

    directory: Path
    name: str
    model: LlavaForConditionalGeneration
    preprocessor: Preprocessor
    manifest: Manifest
    fingerprint: str


def open_transformers(checkpoint: str | Path, device: str = "cpu", dtype: str = "auto") -> Source:
    """Check a checkpoint and open it with transformers. Raises what `load` raises."""
    if dtype not in ("auto", *DTYPES):
        raise CheckpointError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    directory = resolve(checkpoint)
    shards = check_files(directory)
    config = _config(directory)
    check_supported(config)
    manifest = read_manifest(directory)
    _verify(directory, manifest)
    model, info = _from_pretrained(directory, device, dtype)
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted((*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])))
        raise CheckpointError(f"{directory}: {len(wrong)} tensors are missing or have another shape, first {wrong[0]}")
    return Source(
        directory=directory,
        name=_name(directory),
        model=model,
        preprocessor=Preprocessor(_processor(directory), config, visual_tokens_per_image(config)),
        manifest=manifest,
        fingerprint="fp_" + fingerprint(shards),
    )


def _name(directory: Path) -> str:
    """What a checkpoint is called to clients."""
    return next((f"espalier-{name}" for name, path in SHIPPED.items() if path == directory), directory.resolve().name)


def _config(directory: Path) -> LlavaConfig:
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # whatever transformers' parsers raise
        raise CheckpointError(f"{directory / 'config.json'}: {_reason(error)}") from error


def _processor(directory: Path) -> LlavaProcessor:
    try:
        processor = LlavaProcessor.from_pretrained(directory)
    except Exception as error:  # the same
        raise CheckpointError(f"{directory}: the processor does not load: {_reason(error)}") from error
    if not processor.chat_template:
        raise CheckpointError(f"{directory}: chat_template.jinja is missing; copy the processor's files beside the weights")
    return processor


def _reason(error: Exception) -> str:
    """transformers says first what is wrong, and then lists for some pages what else there is."""
    return " ".join(str(error).split()).split(". ")[0]


def _from_pretrained(directory: Path, device: str, dtype: str) -> tuple[LlavaForConditionalGeneration, dict[str, Any]]:
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, info = SlicedLlava.from_pretrained(
            directory,
            dtype=DTYPES.get(dtype, "auto"),
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported, and refused by our caller with the tensor's name
            output_loading_info=True,
        )
        return model.to(device), info  # tensor by tensor: no device holds a second copy
    finally:
        if progress:
            transformers_logging.enable_progress_bar()


def check_files(directory: Path) -> list[Path]:
    """The weight files, after making sure that all that is needed is there and whole."""
    config = directory / "config.json"
    if not config.exists():
        raise CheckpointError(f"{config} is missing; a checkpoint needs config.json, *.safetensors and a processor")
    try:
        architectures = json.loads(config.read_text()).get("architectures") or ["none"]
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} is not a JSON object: {error}") from error
    if architectures != ["LlavaForConditionalGeneration"]:
        raise CheckpointError(f"{config}: architecture {architectures[0]} is not LlavaForConditionalGeneration")
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{directory}: tokenizer.json is missing; copy the processor's files beside the weights")
    if not any((directory / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        raise CheckpointError(
            f"{directory}: preprocessor_config.json is missing; copy the processor's files beside the weights"
        )
    shards = _shards(directory)
    for shard in shards:
        if not shard.exists():
            pickles = [p.name for p in directory.glob("*.bin")]
            hint = f"; {pickles[0]} is a pickle, which is never loaded: convert it" if pickles else ""
            raise CheckpointError(f"{shard} is missing{hint}")
        try:
            with safe_open(shard, "pt") as file:
                file.keys()
        except SafetensorError as error:
            raise CheckpointError(f"{shard} is truncated or not safetensors ({error}); fetch it again") from error
    return shards


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.exists():
        return [directory / "model.safetensors"]
    try:
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards; fetch it again") from error


def fingerprint(shards: list[Path], slices: int = 64, width: int = 1 << 14) -> str:
    """Twelve hex digits of slices spread over the weight files, and their sizes: enough to tell checkpoints apart, pruned ones
    included, and instant at any size."""
    digest = hashlib.sha256()
    for shard in shards:
        size = shard.stat().st_size
        digest.update(str(size).encode())
        with shard.open("rb") as file:
            for i in range(slices):
                file.seek(i * max(size - width, 0) // (slices - 1))
                digest.update(file.read(width))
    return digest.hexdigest()[:12]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(directory: Path, manifest: Manifest) -> None:
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.exists() or sha256(path) != expected:
            raise CheckpointError(f"{path} is not the file that {MANIFEST} describes; fetch both again")
