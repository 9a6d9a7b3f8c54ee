"""The shipped checkpoints (`weights/`), the world they know (`world/`) and the recipe that made the dense one (`train.py`)."""

from pathlib import Path

_WEIGHTS = Path(__file__).parent / "weights"
SHIPPED = {"embedded": _WEIGHTS / "pruned", "embedded-dense": _WEIGHTS / "dense"}
"""The checkpoints that come with Espalier, by the names that stand wherever a checkpoint is asked for."""
