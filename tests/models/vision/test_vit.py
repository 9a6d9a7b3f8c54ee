"""The CLIP tower against transformers."""

from __future__ import annotations

import pytest
import torch

from models.llava import from_transformers
from models.random_llava import random_model, tiny_config
from tests.models.tiny_llava import pair, pixels


@pytest.mark.parametrize(
    ("layer", "strategy"),
    [(-1, "default"), (-2, "default"), (1, "default"), ([-1, -2], "default"), ([1, 3], "default"), (-1, "full"), (2, "full")],
)
def test_image_features_match_transformers(layer, strategy):
    config = tiny_config()
    config.vision_feature_layer, config.vision_feature_select_strategy = layer, strategy
    reference, model = random_model(config, seed=1), from_transformers(random_model(config, seed=1))
    pics = pixels(3, seed=4)  # more than a CPU encodes at once
    expected = reference.model.get_image_features(
        pics, vision_feature_layer=layer, vision_feature_select_strategy=strategy
    ).pooler_output
    features = model.vision(pics)
    torch.testing.assert_close(features.tokens, torch.stack(list(expected)), rtol=1e-4, atol=1e-5)
    assert features.attention.shape == features.tokens.shape[:2]
    assert model.visual_tokens_per_image == features.tokens.shape[1]


def test_unused_vision_layers_are_not_computed():
    _, model = pair()
    assert len(model.vision.tower.layers) == 2  # of three; the feature layer is -2
