"""Vision towers. Each kind has a module with `check_supported`, `visual_tokens` and `from_transformers`."""

from types import ModuleType

from models.vision import efficientnet, vit

TOWERS: dict[str, ModuleType] = {
    "clip_vision_model": vit,
    "siglip_vision_model": vit,
    efficientnet.EfficientNetLiteConfig.model_type: efficientnet,
}
"""The towers that run, by the `model_type` of their configuration."""
