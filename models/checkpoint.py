"""Load a checkpoint: what `transformers` loads, plus `espalier.json`, our manifest."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, LlavaProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from models.errors import CheckpointError
from models.families import ARCHITECTURES, family_of
from models.headers import TensorHeader, first_misfit, read_headers
from models.layer_shapes import head_dim, layer_shapes, sliced
from models.llava import Llava, check_supported, from_transformers
from models.manifest import MANIFEST, Manifest, read_manifest
from models.preprocess import Preprocessor
from models.quantized import QUANTIZED, bitsandbytes, multiplied_natively, quantization_of, read_dense

INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Checkpoint:
    directory: Path
    name: str
    model: Llava
    preprocessor: Preprocessor
    eos: frozenset[int]
    manifest: Manifest
    fingerprint: str
    quantization: str | None = None


def load(directory: Path, device: str = "cpu", dtype: str = "auto", quantization: str | None = None) -> Checkpoint:
    """Load a LLaVA checkpoint for our forward. `auto` is the dtype it was saved in; `quantization` is int8 or nf4, by default what
    it was saved in.

    Raises CheckpointError for a missing or truncated file and UnsupportedCheckpoint for what the forward does not compute.
    """
    check_device(device)
    source, quantization, saved = _open(directory, device, dtype, quantization)
    manifest = source.manifest
    eos = source.model.generation_config.eos_token_id
    if eos is None:
        eos = source.model.config.text_config.eos_token_id
    # bitsandbytes' own files have no form for an embedding that is the head too.
    model = from_transformers(
        source.model, quantization, saved=saved, quantize_embedding=not saved or bool(manifest.quantization), device=device
    )
    check_manifest(directory, manifest, model)
    return Checkpoint(
        directory=directory,
        name=source.name,
        model=model,
        preprocessor=source.preprocessor,
        eos=frozenset(eos if isinstance(eos, list) else [eos]),
        manifest=manifest,
        fingerprint=source.fingerprint,
        quantization=quantization,
    )


def check_manifest(directory: Path, manifest: Manifest, model: Llava) -> None:
    """Raise CheckpointError for what a manifest says of another model than this one."""
    if manifest.calibration and len(manifest.calibration.layer_change) != model.num_layers:
        raise CheckpointError(
            f"{directory / MANIFEST}: calibration.layer_change has {len(manifest.calibration.layer_change)} values for "
            f"{model.num_layers} layers; remove `calibration` and run `espalier calibrate`"
        )
    if manifest.patch_ratio and model.vision.tower.merge_layer is None:
        raise CheckpointError(
            f"{directory / MANIFEST}: patch_ratio needs a vision transformer, and this tower is convolutional; remove it"
        )


@dataclass
class TransformersCheckpoint:
    """A checkpoint as transformers loads it: our forward takes its weights from it, and static pruning works on it."""

    directory: Path
    name: str
    model: PreTrainedModel
    preprocessor: Preprocessor
    manifest: Manifest
    fingerprint: str


def open_transformers(directory: Path, device: str = "cpu", dtype: str = "auto") -> TransformersCheckpoint:
    """Check a checkpoint and open it with transformers. Raises what `load` raises, and CheckpointError for quantized weights."""
    check_device(device)
    source, quantization, _ = _open(directory, device, dtype, None)
    if quantization:
        raise CheckpointError(f"{directory} holds {quantization} weights, which cannot be changed; take the dense checkpoint")
    source.model.to(device)  # tensor by tensor: no device holds a second copy
    return source


@dataclass(frozen=True)
class Footprint:
    """What a checkpoint takes in memory: its weights before they are packed or quantized, and one token in the KV cache."""

    weight_bytes: int
    kv_token_bytes: int


def footprint(directory: Path, dtype: str = "auto") -> Footprint:
    """By the headers of its files, which are checked; no weight is read. Raises CheckpointError and UnsupportedCheckpoint."""
    shards = check_files(directory)
    config = _config(directory)
    check_supported(config)
    text, itemsize = config.text_config, (DTYPES.get(dtype) or config.dtype or torch.float32).itemsize
    heads = sum(shape.kv_heads for shape in layer_shapes(text))
    weights = sum(header.nbytes(itemsize) for header in read_headers(shards).values())
    return Footprint(weights, 2 * heads * head_dim(text) * itemsize)


def _open(
    directory: Path, device: str, dtype: str, quantization: str | None
) -> tuple[TransformersCheckpoint, str | None, bool]:
    """A checkpoint in memory, all weights dense; the format that they shall have, and whether its files hold it."""
    if dtype not in ("auto", *DTYPES):
        raise CheckpointError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    if quantization not in (None, *QUANTIZED):
        raise CheckpointError(f"quantization {quantization!r} is not one of {', '.join(QUANTIZED)}")
    shards = check_files(directory)
    config = _config(directory)
    check_supported(config)
    saved = quantization_of(config)
    if saved and quantization not in (None, saved):
        raise CheckpointError(f"{directory} holds {saved} weights, which do not become {quantization}: what was rounded is lost")
    _check_shapes(directory, config, read_headers(shards))
    if (quantization := quantization or saved) and not multiplied_natively(quantization, device, DTYPES.get(dtype, config.dtype)):
        bitsandbytes()
    manifest = read_manifest(directory)
    _verify(directory, manifest)
    weights: dict[str, Tensor] | None = None
    if saved:
        weights = read_dense(shards, DTYPES.get(dtype) or config.dtype or torch.float16)
        del config.quantization_config  # else transformers would make modules of bitsandbytes'
    model, info = _from_pretrained(config, directory, dtype, weights)
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted((*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])))
        strange = sorted(info["unexpected_keys"])
        half = f"; {len(strange)} have names that no part takes, first {strange[0]}: half converted?" if strange else ""
        raise CheckpointError(f"{directory}: {len(wrong)} tensors are missing or have another shape, first {wrong[0]}{half}")
    source = TransformersCheckpoint(
        directory=directory,
        name=manifest.name or directory.resolve().name,
        model=model,
        preprocessor=_preprocessor(directory, config),
        manifest=manifest,
        fingerprint="fp_" + fingerprint(shards),
    )
    return source, quantization, saved is not None


def check_device(name: str) -> None:
    """Raises CheckpointError for a device that is not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CheckpointError(f"device {name!r} is not cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (count := torch.cuda.device_count()) <= (device.index or 0):
        raise CheckpointError(f"device {name!r} is not here: torch sees {count} CUDA devices; use --device cpu")


def _config(directory: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # whatever transformers' parsers raise
        raise CheckpointError(f"{directory / 'config.json'}: {_reason(error)}") from error


def _preprocessor(directory: Path, config: PreTrainedConfig) -> Preprocessor:
    size = config.vision_config.image_size
    try:
        preprocessor = Preprocessor(_processor(directory), config)
        made = preprocessor.picture(Image.new("RGB", (size, size))).pixels
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    if made.shape[-2:] != (size, size):
        raise CheckpointError(
            f"{directory}: the processor makes pictures of {made.shape[-2]} x {made.shape[-1]} pixels and the tower takes "
            f"{size} x {size}; copy the processor's files that belong to the weights"
        )
    return preprocessor


def _processor(directory: Path) -> LlavaProcessor:
    """The picture's processor, the tokenizer and the chat template. Those are all that is needed of any family's processor, whose
    own class may want more: OneVision's decodes films with torchvision."""
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


def _from_pretrained(
    config: PreTrainedConfig, directory: Path, dtype: str, weights: dict[str, Tensor] | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model, info = sliced(family_of(config).model).from_pretrained(
            directory if weights is None else None,
            config=config,
            state_dict=weights,
            dtype=DTYPES.get(dtype, "auto" if weights is None else config.dtype),
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported, and refused by our caller with the tensor's name
            output_loading_info=True,
        )
        return model, info
    finally:
        if progress:
            transformers_logging.enable_progress_bar()


def check_files(directory: Path) -> list[Path]:
    """The weight files, after making sure that all that is needed is there and whole."""
    config = directory / "config.json"
    if not config.exists():
        raise CheckpointError(f"{config} is missing; a checkpoint needs config.json, *.safetensors and a processor")
    try:
        document = json.loads(config.read_text())
        architectures = document.get("architectures") or ["none"]
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config} is not a JSON object: {error}") from error
    if len(architectures) != 1 or architectures[0] not in ARCHITECTURES:
        known = f"{', '.join(ARCHITECTURES)}{_original(architectures)}"
        raise CheckpointError(f"{config}: architecture {architectures[0]} is not one of {known}")
    if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{directory}: tokenizer.json is missing; copy the processor's files beside the weights")
    if not any((directory / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        raise CheckpointError(
            f"{directory}: preprocessor_config.json is missing; copy the processor's files beside the weights"
        )
    shards = weight_files(directory)
    _check_layers(config, document, len(read_headers(shards)))
    return shards


def _check_layers(config: Path, document: dict[str, Any], tensors: int) -> None:
    """Before anything is made for each layer: a layer has more than one tensor."""
    for section in ("text_config", "vision_config"):
        layers = (document.get(section) or {}).get("num_hidden_layers")
        if isinstance(layers, int) and not 0 < layers <= tensors:
            raise CheckpointError(
                f"{config}: {section} has {layers} layers and the weight files {tensors} tensors; copy the config.json that "
                "belongs to the weights"
            )


def _check_shapes(directory: Path, config: PreTrainedConfig, found: dict[str, TensorHeader]) -> None:
    """What config.json makes is compared with what the files say of their tensors, before any memory is asked for."""
    try:
        with torch.device("meta"):
            expected = sliced(family_of(config).model)(config).state_dict()
    except Exception as error:  # whatever torch and transformers make of sizes that cannot be
        raise CheckpointError(f"{directory / 'config.json'} describes no model: {_reason(error)}") from error
    misfit = first_misfit(
        {_bare(name): tensor for name, tensor in expected.items()}, {_bare(name): header for name, header in found.items()}
    )
    if misfit:
        raise CheckpointError(f"{directory}: the weight files and config.json differ, first another shape: {misfit}")


def _bare(name: str) -> str:
    """A tensor's name, without the modules around it that differ between versions of transformers."""
    return re.sub(r"(^|(?<=\.))(model|language_model|vision_model)\.", "", name)


def weight_files(directory: Path) -> list[Path]:
    """The files of safetensors, all there and whole. Raises CheckpointError."""
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


def weight_bytes(directory: Path) -> int:
    """Of the files that hold a checkpoint's weights."""
    return sum(shard.stat().st_size for shard in weight_files(directory))


def _original(architectures: list[str]) -> str:
    """What to do with LLaVA's own format, which came before transformers'."""
    original = architectures[0].startswith("Llava") and architectures[0].endswith("ForCausalLM")
    return "; it is LLaVA's original format: convert it with `espalier convert`" if original else ""


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
