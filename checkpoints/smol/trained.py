"""Where the weights of `smol` that are trained here lie, and which they are: releases differ in them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from models.manifest import read_manifest

TRAINED = Path(__file__).with_name("weights")
"""What `checkpoints.smol.train` leaves, LoRA and what looks; the router, and the manifest but for the built files."""


@cache
def digest(folder: Path = TRAINED) -> str:
    """Of all that is trained here."""
    found = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        found.update(file.read_bytes())
    return found.hexdigest()[:8]


def is_built(directory: Path, folder: Path = TRAINED) -> bool:
    """Whether a directory holds what is built of these weights. Merged ones are no measure: machines round them differently."""
    return read_manifest(directory).built_from == digest(folder)
