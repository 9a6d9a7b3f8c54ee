"""Write a checkpoint that differs from another in some tensors; all the rest is copied byte for byte."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Size, Tensor

from models.checkpoint import INDEX, check_files, sha256
from models.errors import CheckpointError
from models.manifest import MANIFEST, Manifest, write_manifest

WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf"}
"""Suffixes of files that hold weights: the dense ones must not lie beside the pruned."""


def derive(
    source: Path, out: Path, changed: Mapping[str, Tensor], manifest: Manifest, config: Mapping[str, dict[str, Any]] | None = None,
    stored: Callable[[str, Tensor], Mapping[str, Tensor]] = lambda key, tensor: {key: tensor},
) -> None:  # fmt: skip
    """Copy `source` to `out` with the tensors in `changed`, one shard in memory at a time. The directory appears when it is whole.

    Names in `changed` are `language.3.self_attn.q_proj.weight`, `vision.…` and `projector.linear_1.weight`, whatever the files call
    them; the files' dtypes stay. `config` has changed keys of `config.json`, by section. `stored` says as what a file's tensor is
    written, itself by default. Raises CheckpointError for a name that no file has, FileExistsError where `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists")
    shards = check_files(source)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file() and path.suffix not in WEIGHTS and path.name != MANIFEST:
                shutil.copyfile(path, part / path.name)  # the source may be read-only
        if config:
            document = json.loads((part / "config.json").read_text())
            for section, keys in config.items():
                document[section] = document.get(section, {}) | keys
            (part / "config.json").write_text(json.dumps(document, indent=2) + "\n")
        missing, hashes, size = set(changed), {}, 0
        weight_map: dict[str, str] = {}
        for shard in shards:
            tensors: dict[str, Tensor] = {}
            with safe_open(shard, "pt") as file:
                for key in file.keys():
                    tensor, name = file.get_tensor(key), plain_name(key)
                    if name in changed:
                        tensor = changed[name].detach().to("cpu", tensor.dtype).contiguous()
                        missing.discard(name)
                    tensors |= stored(key, tensor)
            weight_map |= dict.fromkeys(tensors, shard.name)
            size += sum(tensor.nbytes for tensor in tensors.values())
            save_tensors(tensors, part / shard.name)
            hashes[shard.name] = sha256(part / shard.name)
        if missing:
            raise CheckpointError(f"{source}: no file holds {min(missing)}")
        index = part / INDEX
        if index.exists():
            document = json.loads(index.read_text())
            document["metadata"] = document.get("metadata", {}) | {"total_size": size}
            document["weight_map"] = weight_map
            index.write_text(json.dumps(document, indent=2) + "\n")
        write_manifest(part, manifest.model_copy(update={"files": hashes}))
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with the usual permissions. Raises OSError, and leaves nothing, where there is no room for it."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error
    usual_permissions(path)


def usual_permissions(path: Path) -> None:
    """Those of any new file; safetensors makes its own readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def tensor_places(directory: Path) -> dict[str, tuple[Path, str]]:
    """Where each tensor of a checkpoint lies, by plain name: its file, and its key there."""
    places: dict[str, tuple[Path, str]] = {}
    for shard in check_files(directory):
        with safe_open(shard, "pt") as file:
            places |= {plain_name(key): (shard, key) for key in file.keys()}
    return places


def tensor_shapes(directory: Path) -> dict[str, Size]:
    """Of each tensor of a checkpoint, by plain name."""
    shapes = {}
    for name, (shard, key) in tensor_places(directory).items():
        with safe_open(shard, "pt") as file:
            shapes[name] = Size(file.get_slice(key).get_shape())
    return shapes


def plain_name(key: str) -> str:
    """`language.3.mlp.up_proj.weight` of a file's key, old or new style; other tensors keep their key."""
    if found := re.search(r"(vision_tower|language_model)\..*?layers\.(\d+\..+)$", key):
        return f"{found[1].split('_')[0]}.{found[2]}"
    if found := re.search(r"multi_modal_projector\.(.+)$", key):
        return f"projector.{found[1]}"
    return key
