"""Vision towers. Each kind has a module with `check_supported`, `visual_tokens` and `from_transformers`."""

from types import ModuleType

from models.vision import clip, efficientnet

TOWERS: dict[str, ModuleType] = {"clip_vision_model": clip, efficientnet.EfficientNetLiteConfig.model_type: efficientnet}
"""The towers that run, by the `model_type` of their configuration."""
