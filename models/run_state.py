"""A run's finished parts on disk, so that a run that was stopped goes on. Every file appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.files import write_whole
from models.saving import save_tensors

RECIPE = "recipe.json"


class RunStateError(ValueError):
    """The run on disk cannot go on; the message says what to do."""


def run_directory(out: Path) -> Path:
    """Where a run keeps its finished parts."""
    return out.with_name(out.name + ".work")


class RunState:
    """The directory beside the output with what is finished of a run of `recipe` on `source`."""

    def __init__(self, out: Path, recipe: dict[str, Any], source: str) -> None:
        self.out, self.directory = out, run_directory(out).resolve()
        wanted = {"recipe": recipe, "source": source}
        path = self.directory / RECIPE
        self.resumed = path.exists()
        if self.resumed and json.loads(path.read_text()) != wanted:
            raise RunStateError(
                f"{self.directory} holds an unfinished run of another recipe, checkpoint or calibration; "
                "remove it, or name another --out"
            )
        if not self.resumed and self.directory.exists() and any(self.directory.iterdir()):
            raise RunStateError(
                f"{self.directory} holds files and no recipe.json, so it is no run; remove it, or name another --out"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self.write("recipe", wanted)

    @property
    def draft(self) -> Path:
        """The whole new checkpoint, until it is renamed to the output."""
        return self.directory / "checkpoint"

    def complete(self) -> None:
        """The draft becomes the output; what the run had finished goes."""
        self.draft.replace(self.out)
        (self.directory / RECIPE).unlink()  # first: what is left of a removal that is cut short must be no run
        shutil.rmtree(self.directory)

    def read(self, name: str) -> Any:
        """What `write` stored, or None."""
        path = self.directory / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, name: str, document: Any) -> None:
        write_whole(self.directory / f"{name}.json", json.dumps(document).encode())

    def read_tensors(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors that `write_tensors` stored and the record beside them, or None."""
        path = self.directory / f"{name}.safetensors"
        if not path.exists():
            return None
        record = read_record(path)
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, record

    def remove_tensors(self, name: str) -> None:
        """Nothing where there are none."""
        (self.directory / f"{name}.safetensors").unlink(missing_ok=True)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        write_tensors(self.directory / f"{name}.safetensors", tensors, record)


def read_record(path: Path) -> dict[str, Any]:
    """The record that `write_tensors` stored. Raises RunStateError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()["record"])
            return record
    except SafetensorError as error:
        raise RunStateError(f"{path} is damaged ({error}); remove it and run again: only its part is made anew") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    save_tensors(whole, part, {"record": json.dumps(record)})
    part.replace(path)
