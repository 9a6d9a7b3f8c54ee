"""What can be wrong with a checkpoint; without any other package, so that the model alone needs none."""

from __future__ import annotations


class CheckpointError(Exception):
    """The checkpoint cannot be loaded; the message names the file or key at fault and what to do."""
