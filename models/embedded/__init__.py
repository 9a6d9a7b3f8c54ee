"""The default checkpoint (`weights/`), the world it was trained on (`world/`) and the recipe that made it (`train.py`)."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Directory of the shipped checkpoint, in the layout that `transformers` loads."""
