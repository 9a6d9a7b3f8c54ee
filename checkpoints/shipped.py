"""The checkpoints that come with Espalier, by name."""

from __future__ import annotations

from pathlib import Path

from models.manifest import CheckpointError

_HERE = Path(__file__).parent
SHIPPED = {
    "embedded": _HERE / "embedded" / "weights" / "pruned",
    "embedded-dense": _HERE / "embedded" / "weights" / "dense",
}


def resolve(checkpoint: str, *, write: bool = False) -> Path:
    """The directory of a shipped checkpoint's name, or of a path.

    `write` says that the caller will write there: shipped checkpoints are refused by name, not by path. Raises CheckpointError.
    """
    if checkpoint in SHIPPED:
        if write:
            raise CheckpointError(f"{checkpoint} ships with Espalier and stays as it is: copy {SHIPPED[checkpoint]}, name the copy")
        return SHIPPED[checkpoint]
    path = Path(checkpoint)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; name one that holds a LLaVA checkpoint, or one of {', '.join(SHIPPED)}")
    return path
