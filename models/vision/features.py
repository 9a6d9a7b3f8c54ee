"""What every vision tower gives, and the projector behind it: pixels to visual tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Size, Tensor
from transformers.activations import ACT2FN

from models.cuda_graph import Captured, can_capture, capture
from models.ops import quick_gelu
from models.sparse import AnyLinear

if TYPE_CHECKING:
    from models.families import Layout

MAX_CPU_BATCH = 2
"""Images that a CPU encodes at once: four to sixteen took up to 1.25 times as long each, one 1.05 times."""
MOST_GRAPHS = 16
"""Pictures in tiles are one to ten images, and some levels merge patches."""


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

    @property
    def other_bytes(self) -> int:
        """Resident bytes of the weights that are none of `linears`."""
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
        if pixels.device.type == "cuda" and torch.is_inference_mode_enabled():
            return self._graphs(pixels, patch_ratio)
        return self._encode(pixels, patch_ratio)

    @cached_property
    def _graphs(self) -> VisionGraphs:
        return VisionGraphs(self._encode, [*self.tower.linears().values(), *self.projector])

    def _encode(self, pixels: Tensor, patch_ratio: float) -> ImageFeatures:
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


@dataclass(frozen=True)
class VisionGraphs:
    """An encoder on a GPU as CUDA graphs, without Python for a layer: one for each shape of pixels and share of patches that has
    come, up to MOST_GRAPHS. Where there is no graph, `encode` itself runs."""

    encode: Callable[[Tensor, float], ImageFeatures]
    matrices: Sequence[AnyLinear]
    graphs: dict[tuple[Size, float], tuple[Tensor, Captured[ImageFeatures]] | None] = field(default_factory=dict)

    def __call__(self, pixels: Tensor, patch_ratio: float) -> ImageFeatures:
        key = (pixels.shape, patch_ratio)
        if key not in self.graphs and len(self.graphs) < MOST_GRAPHS:
            self.graphs[key] = self._capture(pixels, patch_ratio)
        if (made := self.graphs.get(key)) is None:
            return self.encode(pixels, patch_ratio)
        place, captured = made
        place.copy_(pixels)
        features = captured.replay()
        attention = None if features.attention is None else features.attention.clone()
        return ImageFeatures(features.tokens.clone(), attention)  # the next replay writes there again

    def _capture(self, pixels: Tensor, patch_ratio: float) -> tuple[Tensor, Captured[ImageFeatures]] | None:
        """Where the graph finds its pixels, and the graph."""
        if not can_capture(self.matrices):
            return None
        place, beside = pixels.clone(), [made[1] for made in self.graphs.values() if made]
        captured = capture(lambda: self.encode(place, patch_ratio), f"{len(pixels)} images", pixels.device, beside)
        return (place, captured) if captured else None
