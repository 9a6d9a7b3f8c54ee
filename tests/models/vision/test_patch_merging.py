"""Patches merged inside a vision transformer: which, what becomes of them, and that nothing behind the tower sees fewer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evals.inspect import tower_line
from models.checkpoint import check_manifest
from models.errors import CheckpointError
from models.llava import from_transformers
from models.manifest import Manifest
from models.random_llava import random_model, tiny_config
from models.vision.efficientnet import EfficientNetTower
from models.vision.patch_merging import MergedRows
from models.vision.vit import VisionTransformer
from tests.models.tiny_llava import pixels

PATCHES = 16


def tower(kind: str = "clip", layer: int | list[int] = -2) -> VisionTransformer:
    config = tiny_config(tower=kind)
    config.vision_feature_layer = layer
    return from_transformers(random_model(config, seed=1)).vision.tower


def twins(images: int, seed: int) -> Tensor:
    """Pictures whose patches are alike two by two."""
    rows = torch.randn(images, 3, 32, 2, 8, generator=torch.Generator().manual_seed(seed))
    return rows[:, :, :, :, None].expand(-1, -1, -1, -1, 2, -1).flatten(3)


def test_alike_places_merge_and_the_first_stays_alone() -> None:
    keys = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 1)[:, 1:]
    merged = MergedRows.of(keys, 5, first=1)
    assert merged.owner.tolist() == [[0, 1, 1, 2, 2, 3, 3, 4, 4]] and merged.sizes.tolist() == [[1, 2, 2, 2, 2]]
    values = torch.arange(18.0).view(1, 9, 2)
    assert merged.means(values)[0].tolist() == [[0, 1], [3, 4], [7, 8], [11, 12], [15, 16]]
    assert merged.unmerge(merged.means(values))[0, :, 0].tolist() == [0, 3, 3, 7, 7, 11, 11, 15, 15]
    fewest = MergedRows.of(keys, 2, first=1)
    assert fewest.owner.tolist() == [[0] + [1] * 8] and fewest.sizes.tolist() == [[1, 8]]


@pytest.mark.parametrize(("kind", "layer"), [("clip", -2), ("clip", -1), ("clip", [1, 2]), ("siglip", -1)])
@pytest.mark.parametrize("ratio", [0.75, 0.25, 0.01])
def test_merged_places_are_copies_and_none_is_missing(kind: str, layer: int | list[int], ratio: float) -> None:
    vit, pictures = tower(kind, layer), pixels(2, seed=3)
    whole, features = vit(pictures), vit(pictures, ratio)
    assert features.tokens.shape == whole.tokens.shape
    keep = max(1, round(PATCHES * ratio))
    assert [len(one.unique(dim=0)) for one in features.tokens] == [keep, keep]
    torch.testing.assert_close(vit(pictures[1:], ratio).tokens, features.tokens[1:])
    if kind == "clip":
        assert features.attention.shape == whole.attention.shape and bool((features.attention.sum(-1) <= 1).all())


@given(seed=st.integers(0, 1000), ratio=st.sampled_from([0.5, 0.6, 0.9]))
def test_alike_patches_merge_without_loss(seed: int, ratio: float) -> None:
    vit, pictures = TOWER, twins(2, seed)
    whole, features = vit(pictures), vit(pictures, ratio)
    torch.testing.assert_close(features.tokens, whole.tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features.attention, whole.attention, rtol=1e-4, atol=1e-5)


TOWER = tower()
TOWER.position_embedding = torch.zeros_like(TOWER.position_embedding)


def test_a_convolutional_tower_refuses() -> None:
    convolutional: Any = EfficientNetTower(torch.nn.Identity())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no patches to merge"):
        convolutional(pixels(1, seed=0), 0.5)
    model: Any = SimpleNamespace(vision=SimpleNamespace(tower=convolutional))
    assert tower_line(model) == "vision tower: convolutional, whole at every level"
    with pytest.raises(CheckpointError, match=r"patch_ratio needs a vision transformer, and this tower is convolutional"):
        check_manifest(Path("smol"), Manifest(patch_ratio={"strong": 0.5}), model)
