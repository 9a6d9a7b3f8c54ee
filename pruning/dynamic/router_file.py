"""The router beside the weights: `router.safetensors`, described in the manifest's section `router`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from models import kernels
from models.checkpoint import Checkpoint
from models.errors import CheckpointError, faults
from models.headers import first_misfit, read_headers
from models.manifest import MANIFEST, Manifest
from models.saving import save_tensors
from pruning.dynamic.levels import OperatingPoint, Share
from pruning.dynamic.router import Router, RouterConfig

FILE = "router.safetensors"


class Measured(BaseModel):
    """What a cost weight makes of held-out questions on average."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: int
    cost_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    flops_ratio: Annotated[float, Field(gt=0, le=2)]
    visual_ratio: Share
    agreement: Share


class LevelRecord(BaseModel):
    """A level's cost weights, of questions that open a chat and of those that follow an answer; None where no such were asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    first: Measured
    follow_up: Measured | None = None


class RouterRecord(BaseModel):
    """The manifest's section `router`: what it is, for which weights, and how it was trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: RouterConfig
    checkpoint: str = Field(description="Fingerprint of the weights that it was trained for.")
    training: dict[str, Any] = Field(description="Every setting, by the names of `espalier route`.")
    report: dict[str, Any] = Field(description="How well it predicts on held-out pictures.")
    operating_points: tuple[OperatingPoint, ...] = Field(description="What it chooses from; the whole model last.")
    levels: dict[str, LevelRecord]
    cost_weight_sweep: dict[str, list[Measured]] = Field(
        description="What many cost weights buy, of operating points that leave out tokens alone and of all."
    )

    @classmethod
    def of(cls, manifest: Manifest) -> RouterRecord | None:
        """The record in a manifest, None if it has none. Raises CheckpointError that names the key at fault."""
        try:
            return None if manifest.router is None else cls.model_validate(manifest.router)
        except ValidationError as error:
            raise CheckpointError(f"{MANIFEST}: router.{faults(error)[0]}; run `espalier route`") from error


def save_router(router: Router, path: Path) -> None:
    save_tensors({name: tensor.contiguous() for name, tensor in router.state_dict().items()}, path)


def load_router(checkpoint: Checkpoint) -> Router | None:
    """The checkpoint's router, on the model's device; None if it has none.

    Raises CheckpointError for a file that is missing or damaged, and for a router that was trained for another checkpoint.
    """
    record = RouterRecord.of(checkpoint.manifest)
    if record is None:
        return None
    path, model, rounded = checkpoint.directory / FILE, checkpoint.model, checkpoint.manifest.quantization
    weights = rounded.fingerprint if rounded else checkpoint.fingerprint  # routers hold for rounded weights too
    if record.checkpoint != weights:
        raise CheckpointError(
            f"{path} was trained for checkpoint {record.checkpoint} and this one is {weights}: its scores predict "
            "another model; run `espalier route`"
        )
    try:
        router = _load(record.config, path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not load ({str(error).splitlines()[0]}); run `espalier route`") from error
    config = record.config
    if any(one.skipped_layers + one.frozen_layers > model.num_layers for one in record.operating_points):
        raise CheckpointError(f"{MANIFEST}: router.operating_points leave out more layers than there are; run `espalier route`")
    if (config.model_width, config.model_layers) != (model.config.text_config.hidden_size, model.num_layers):
        raise CheckpointError(
            f"{path} is for {config.model_layers} layers of width {config.model_width}, and the model's are others; "
            "run `espalier route`"
        )
    # The faster one: where prompts are multiplied in float32, so is the router's, in 0.7 of the time.
    in_float32 = model.device.type == "cpu" and kernels.many_rows() == "float32"
    return router.serving(torch.float32 if in_float32 else model.dtype).to(model.device)


def _load(config: RouterConfig, path: Path) -> Router:
    """Raises RuntimeError, before it asks for memory, for a file that holds another router."""
    headers = read_headers([path])
    if config.depth > len(headers):
        raise RuntimeError(f"{config.depth} layers and {len(headers)} tensors")
    with torch.device("meta"):
        router = Router(config)
    if misfit := first_misfit(router.state_dict(), headers):
        raise RuntimeError(misfit)
    router.load_state_dict(load_file(path), assign=True)
    return router
