"""Vision towers. Each kind has a module with `check_supported`, `visual_tokens` and `from_transformers`."""

from types import ModuleType

from models.vision import clip

TOWERS: dict[str, ModuleType] = {"clip_vision_model": clip}
"""The towers that run, by the `model_type` of their configuration."""
