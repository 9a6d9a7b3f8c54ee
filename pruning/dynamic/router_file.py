"""The router beside the weights: `router.safetensors`, described in the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from models.checkpoint import Checkpoint
from models.manifest import MANIFEST, CheckpointError, Manifest, first_fault
from models.saving import save_tensors
from pruning.dynamic.router import Router, Shape

FILE = "router.safetensors"


class RouterRecord(BaseModel):
    """The manifest's `router` section: what the router is, for which weights, and how it was trained."""

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

    @classmethod
    def of(cls, manifest: Manifest) -> RouterRecord | None:
        """The record in a manifest, None if it has none. Raises CheckpointError that names the key at fault."""
        try:
            return None if manifest.router is None else cls.model_validate(manifest.router)
        except ValidationError as error:
            raise CheckpointError(f"{MANIFEST}: router.{first_fault(error)}; run `espalier route`") from error


def save_router(router: Router, path: Path) -> None:
    save_tensors({name: tensor.contiguous() for name, tensor in router.state_dict().items()}, path)


def load_router(checkpoint: Checkpoint) -> Router | None:
    """The checkpoint's router, on the model's device; None if it has none.

    Raises CheckpointError for a file that is missing or damaged, and for a router that was trained for another checkpoint.
    """
    record = RouterRecord.of(checkpoint.manifest)
    path = checkpoint.directory / FILE
    if record is None:
        return None
    if record.checkpoint != checkpoint.fingerprint:
        raise CheckpointError(
            f"{path} was trained for checkpoint {record.checkpoint} and this one is {checkpoint.fingerprint}: its scores foresee "
            "another model; run `espalier route`"
        )
    try:
        router = Router(Shape(**record.shape))
        router.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} does not load ({str(error).splitlines()[0]}); run `espalier route`") from error
    if (router.shape.width, router.shape.layers) != (checkpoint.model.config.text_config.hidden_size, checkpoint.model.num_layers):
        raise CheckpointError(
            f"{path} is for {router.shape.layers} layers of rows of {router.shape.width}, and the model's are others; "
            "run `espalier route`"
        )
    return router.serving(checkpoint.model.dtype).to(checkpoint.model.device)
