"""The LLaVA families, and what differs between them: how a picture becomes visual tokens. All else is one forward.

LLaVA-1.5 and LLaVA-Interleave look at a picture once. LLaVA-NeXT and LLaVA-OneVision look at it once made small, and again in tiles
of the tower's size, as many as its shape needs. The tiles' tokens lie row by row as one large picture, without the padding that
filled the grid, and the end of each row is marked by a learned newline token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.image_processing_utils import select_best_resolution

from models.vision import TOWERS

POOL_FROM = 1.1
"""How much longer each side of the tiles' map must be than what its configuration allows, before OneVision pools it."""


@dataclass(frozen=True)
class Layout:
    """How the visual tokens of one picture lie in its prompt.

    First `whole` tokens of the picture made as small as a tile; then, where it has a `grid` of tiles (down, across), `rows` x
    `columns` tokens of all tiles side by side. Of that map `padding` rows and columns are cut off at either end, and it is pooled
    where more is left. With `newline` each row of it ends with a newline token, or, if there are no tiles, the whole.
    """

    whole: int
    newline: bool = False
    grid: tuple[int, int] = (0, 0)
    padding: tuple[int, int] = (0, 0)
    rows: int = 0
    columns: int = 0

    @property
    def tiles(self) -> int:
        """Pictures of the tower's size, the one made small included."""
        return 1 + self.grid[0] * self.grid[1]

    @property
    def visual_tokens(self) -> int:
        return self.whole + self.rows * self.columns + len(self.newlines)

    @cached_property
    def newlines(self) -> tuple[int, ...]:
        """Indices of the newline tokens, ascending."""
        return tuple(newline for _, newline in self._rows)

    @cached_property
    def _rows(self) -> tuple[tuple[int, int], ...]:
        """The first token of each row that a newline ends, and the newline."""
        if not self.newline:
            return ()
        if self.grid == (0, 0):
            return ((0, self.whole),)
        starts = range(self.whole, self.whole + self.rows * (self.columns + 1), self.columns + 1)
        return tuple((start, start + self.columns) for start in starts)

    def newlines_of(self, kept: Sequence[int]) -> list[int]:
        """The newline tokens of the rows that still have one of the `kept` tokens (indices, none of them newlines)."""
        seen = set(kept)
        return [newline for start, newline in self._rows if not seen.isdisjoint(range(start, newline))]

    def most_tokens(self, kept: int) -> int:
        """The most tokens that stay where `kept` of those that are no newlines do: each may lie in a row of its own."""
        return kept + min(kept, len(self.newlines))


@dataclass(frozen=True)
class Family:
    """What differs between LLaVAs. `model` is transformers' class; `tiled` whether pictures are looked at in tiles too.

    `pooled`: a map of more tiles than the configuration's `vision_aspect_ratio` allows is made smaller. `several_untiled`: a
    picture that is not alone in its prompt has no tiles.
    """

    model: type[Any]
    tiled: bool = False
    pooled: bool = False
    several_untiled: bool = False


FAMILIES = {
    "llava": Family(LlavaForConditionalGeneration),
    "llava_next": Family(LlavaNextForConditionalGeneration, tiled=True),
    "llava_onevision": Family(LlavaOnevisionForConditionalGeneration, tiled=True, pooled=True, several_untiled=True),
}
"""The families that run, by the `model_type` of their configuration."""
ARCHITECTURES = tuple(family.model.__name__ for family in FAMILIES.values())


def family_of(config: PreTrainedConfig) -> Family:
    """Raises ValueError for a family that does not run."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"model type {config.model_type!r} is not supported; {', '.join(FAMILIES)} are")
    return FAMILIES[config.model_type]


def tile_tokens(config: PreTrainedConfig) -> int:
    """Visual tokens of one tile."""
    return int(TOWERS[config.vision_config.model_type].visual_tokens(config))


def layout_of(config: PreTrainedConfig, height: int, width: int, *, alone: bool = True) -> Layout:
    """The layout of a picture of `height` x `width` pixels, `alone` in its prompt or one of several.

    As in LLaVA-NeXT (Liu et al. 2024, llava-vl.github.io) and LLaVA-OneVision (Li et al. 2024, arXiv 2408.03326), with the rounding
    of transformers.
    """
    family, whole = family_of(config), tile_tokens(config)
    if not family.tiled:
        return Layout(whole)
    if family.several_untiled and not alone:
        return Layout(whole, newline=True)
    size = config.vision_config.image_size
    best = select_best_resolution((height, width), config.image_grid_pinpoints)
    side, grid = size // config.vision_config.patch_size, (best[0] // size, best[1] // size)
    rows, columns = side * grid[0], side * grid[1]
    if width / height > columns / rows:  # the picture is as wide as the grid, and padded above and below
        padding = ((rows - int(round(height * (columns / width), 7))) // 2, 0)
    else:
        padding = (0, (columns - int(round(width * (rows / height), 7))) // 2)
    rows, columns = rows - 2 * padding[0], columns - 2 * padding[1]
    if family.pooled:
        ratio = (rows * columns / (most_tiles(config) * side**2)) ** 0.5
        if ratio > POOL_FROM:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return Layout(whole, newline=True, grid=grid, padding=padding, rows=rows, columns=columns)


def most_tiles(config: PreTrainedConfig) -> int:
    """How many tiles' tokens a picture may have at most: the number in `anyres_max_9`. Raises ValueError."""
    name = str(config.vision_aspect_ratio)
    if not name.removeprefix("anyres_max_").isdecimal():
        raise ValueError(f"vision_aspect_ratio {name!r} is not anyres_max_ and a number")
    return int(name.removeprefix("anyres_max_"))


def check_tiles(config: PreTrainedConfig) -> None:
    """Raise ValueError, naming the key, for a grid of tiles that the tower cannot fill."""
    family = family_of(config)
    if not family.tiled:
        return
    vision = config.vision_config
    grids = config.image_grid_pinpoints
    if not grids:
        raise ValueError("image_grid_pinpoints is empty: no picture fits")
    for sides in grids:
        if len(sides) != 2 or any(side <= 0 or side % vision.image_size for side in sides):
            raise ValueError(f"image_grid_pinpoints: {list(sides)} is not a grid of tiles of {vision.image_size} pixels")
    patches = (vision.image_size // vision.patch_size) ** 2
    if (tokens := tile_tokens(config)) != patches:
        strategy = config.vision_feature_select_strategy
        raise ValueError(f"vision_feature_select_strategy {strategy!r} gives {tokens} tokens a tile, which has {patches} patches")
    if family.pooled:
        most_tiles(config)


def arrange(tokens: Tensor, layout: Layout, newline: Tensor | None) -> Tensor:
    """Tokens of the tiles [tiles, tokens, width], the whole picture's first, to those of the prompt [visual_tokens, width]."""
    whole, *_ = tokens
    parts = [whole]
    if layout.grid != (0, 0):
        parts.append(_side_by_side(tokens[1:], layout, newline))
    elif layout.newline:
        assert newline is not None
        parts.append(newline[None].to(whole))
    return torch.cat(parts)


def _side_by_side(tiles: Tensor, layout: Layout, newline: Tensor | None) -> Tensor:
    side = round(tiles.shape[1] ** 0.5)
    (down, across), (top, left) = layout.grid, layout.padding
    whole = tiles.view(down, across, side, side, -1).permute(0, 2, 1, 3, 4).reshape(down * side, across * side, -1)
    seen = whole[top : down * side - top, left : across * side - left]
    if seen.shape[:2] != (layout.rows, layout.columns):
        size = [layout.rows, layout.columns]
        seen = F.interpolate(seen.permute(2, 0, 1)[None], size=size, mode="bilinear")[0].permute(1, 2, 0)
    if layout.newline:
        assert newline is not None
        seen = torch.cat([seen, newline.to(seen).expand(layout.rows, 1, -1)], dim=1)
    return seen.flatten(0, 1)
