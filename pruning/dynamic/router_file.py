"""The router beside the weights: `router.safetensors`, described in the manifest."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from models.checkpoint import Checkpoint, CheckpointError
from models.saving import save_tensors
from pruning.dynamic.router import Router, Shape

FILE = "router.safetensors"


def save_router(router: Router, path: Path) -> None:
    save_tensors({name: tensor.contiguous() for name, tensor in router.state_dict().items()}, path)


def load_router(checkpoint: Checkpoint) -> Router | None:
    """The checkpoint's router, on the model's device; None if it has none.

    Raises CheckpointError for a file that is missing or damaged, and for a router that was trained for another checkpoint.
    """
    record = checkpoint.manifest.router
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
