"""`espalier.json`, the manifest beside a checkpoint's weights: its schema, and how it is read and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import CheckpointError, faults
from models.files import write_whole

MANIFEST = "espalier.json"
VERSION: Literal[2] = 2


class Calibration(BaseModel):
    """How much each layer changes the hidden state, and on what that was measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer_change: list[Annotated[float, Field(ge=-0.001, le=2.001)]] = Field(
        description="1 - cosine between a layer's input and output, mean over rows; rounded."
    )
    data: str
    samples: int
    seed: int


class HeldOut(BaseModel):
    """What pruning or rounding cost, on questions about pictures that calibration did not see."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int
    agreement: float = Field(description="Share of them whose greedy answer is the dense model's, token by token.")
    perplexity: float = Field(description="Of the dense model's answers, in the changed model.")
    dense_perplexity: float = Field(description="Of the same answers in the dense model.")


class Pruning(BaseModel):
    """How the weights were pruned, and what came of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: dict[str, Any] = Field(description="Every setting, by the names of `espalier prune`.")
    source: str = Field(description="Name and fingerprint of the dense checkpoint.")
    sparsity: dict[str, float] = Field(description="Share of zeros, or of weights removed, by matrix.")
    damping: dict[str, float] = Field(default_factory=dict, description="Where a Hessian needed more than was asked for.")
    search: list[dict[str, float]] = Field(default_factory=list, description="The best policy of each generation.")
    projector: list[dict[str, Any]] = Field(default_factory=list, description="Held-out divergence before and after each tuning.")
    held_out: HeldOut | None = Field(default=None, description="None where no data was left, or before it was measured.")
    notes: dict[str, Any] = Field(default_factory=dict, description="What else was decided on the way.")


class Quantization(BaseModel):
    """How the weights were rounded to 4 bits, and what came of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(description="Name of the dense checkpoint.")
    fingerprint: str = Field(description="Of the dense checkpoint.")
    data: str
    samples: int
    seed: int
    damping: dict[str, float] = Field(default_factory=dict, description="Where a Hessian needed more than usual.")
    held_out: HeldOut | None = Field(default=None, description="None where no data was left, or before it was measured.")


class Manifest(BaseModel):
    """`espalier.json`. Everything in it is optional: a checkpoint without one serves, with tokens as its only saving."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[2] = VERSION
    name: str | None = Field(default=None, description="The model name shown to clients; the directory's name if there is none.")
    base_model: str | None = None
    trained_on: str | None = Field(default=None, description="The data that it was trained on, if that ships with Espalier.")
    built_from: str | None = Field(default=None, description="Digest of the trained weights that `espalier build` built it from.")
    calibration: Calibration | None = None
    patch_ratio: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        default_factory=dict, description="Share of the patches that the vision tower's later layers see, by level; else all."
    )
    pruning: Pruning | None = None
    finetuning: dict[str, Any] | None = Field(
        default=None,
        description="How `espalier finetune` trained it: its options, the mean loss of each tenth of the steps, and on what it was "
        "trained earlier.",
    )
    quantization: Quantization | None = None
    router: dict[str, Any] | None = Field(default=None, description="The router beside the weights, as `pruning.dynamic` reads it.")
    cards: dict[str, dict[str, Any]] = Field(default_factory=dict, description="What each level was measured to do.")
    files: dict[str, str] = Field(default_factory=dict, description="SHA-256 of the weight files.")

    @property
    def layer_change(self) -> list[float] | None:
        """How much each layer changes the hidden state, if that was measured."""
        return self.calibration.layer_change if self.calibration else None

    def derive(self, **changes: Any) -> Manifest:
        """The manifest of a checkpoint made from this one: name, origin, router and cards hold for this one alone."""
        return self.model_copy(update={"name": None, "built_from": None, "router": None, "cards": {}, **changes})


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint, empty if it has none. Raises CheckpointError that names the key at fault."""
    path = directory / MANIFEST
    if not path.exists():
        return Manifest()
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, dict) and document.get("version") in range(1, VERSION):
            raise CheckpointError(f"{path}: version {document['version']} is older than {VERSION}; {_remake(document)}")
        return Manifest.model_validate(document)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {faults(error)[0]}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _remake(document: dict[str, Any]) -> str:
    """The commands that make a checkpoint with an older manifest anew."""
    commands = [f"`espalier {command}`" for command, key in (("prune", "pruning"), ("route", "router")) if key in document]
    return f"make the checkpoint anew with {', then '.join(commands)}" if commands else "remove it and run `espalier calibrate`"


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_whole(directory / MANIFEST, (json.dumps(manifest.model_dump(exclude_none=True), indent=1) + "\n").encode())
