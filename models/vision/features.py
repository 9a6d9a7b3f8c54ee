"""What every vision tower gives, and the projector behind it: pixels to visual tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from models.ops import quick_gelu
from models.sparse import AnyLinear

if TYPE_CHECKING:
    from models.families import Layout

MAX_CPU_BATCH = 2
"""Images that a CPU encodes at once: four to sixteen took up to 1.25 times as long each, one 1.05 times."""


@dataclass
class ImageFeatures:
    """Visual tokens [images, visual_tokens, width], and the class token's attention to each where the tower has a class token.

    `attention` [images, visual_tokens]; rows sum to at most 1. `layout` says how the tokens of one picture lie, where some are
    newlines.
    """

    tokens: Tensor
    attention: Tensor | None = None
    layout: Layout | None = None


class VisionTower(Protocol):
    """A network from pixels to the features that the projector reads."""

    @property
    def merge_layer(self) -> int | None:
        """The layer behind which patches can be merged; None where there are no patches, but maps."""
        ...

    def __call__(self, pixels: Tensor, patch_ratio: float = 1.0) -> ImageFeatures:
        """Of `pixels` [images, 3, height, width]. Layers behind `merge_layer` run on `patch_ratio` of the patches; the tokens are
        as many as ever."""
        ...

    def linears(self) -> dict[str, AnyLinear]:
        """Every matrix by name, `3.qkv` and the like."""
        ...


@dataclass
class VisionEncoder:
    """A tower and LLaVA's projector."""

    tower: VisionTower
    projector: tuple[AnyLinear, AnyLinear]
    activation: str

    def __call__(self, pixels: Tensor, patch_ratio: float = 1.0) -> ImageFeatures:
        """Encode `pixels` [images, 3, height, width], normalised, in the model's dtype; tokens are as wide as the text model."""
        if pixels.device.type == "cpu" and len(pixels) > MAX_CPU_BATCH:
            parts = [self(part, patch_ratio) for part in pixels.split(MAX_CPU_BATCH)]
            attention = [part.attention for part in parts if part.attention is not None]
            return ImageFeatures(torch.cat([part.tokens for part in parts]), torch.cat(attention) if attention else None)
        features = self.tower(pixels, patch_ratio)
        first, second = self.projector
        rows = features.tokens.flatten(0, 1)  # which the CPU kernels take
        tokens = second(activate(first(rows), self.activation)).unflatten(0, features.tokens.shape[:2])
        return ImageFeatures(tokens, features.attention)


def activate(x: Tensor, name: str) -> Tensor:
    """An activation by its name in a configuration."""
    if name == "quick_gelu":
        return quick_gelu(x)
    activation: Callable[[Tensor], Tensor] = ACT2FN[name]
    return activation(x)
