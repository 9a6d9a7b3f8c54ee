"""Tower and projector on a GPU: all images in one attention, and CUDA graphs in whose place stand-ins are replayed on a CPU."""

from __future__ import annotations

import pytest
import torch

from models.attention import _attend_images_together, attend_images
from models.llava import Llava, from_transformers
from models.random_llava import random_model, tiny_config
from models.vision import features
from models.vision.features import VisionGraphs
from tests.checkpoints.smol.test_shape import tiny_config as convolutional
from tests.models.replayed import Replayed
from tests.models.tiny_llava import pixels


@pytest.mark.parametrize("biased", [False, True])
def test_images_together_and_one_by_one_agree(biased):
    query, keys, values = torch.randn(3, 2, 7, 4, 8, generator=torch.manual_seed(0)).unbind()
    bias = torch.rand(2, 7) if biased else None
    expected = attend_images(query, keys, values, scale=0.3, bias=bias)
    torch.testing.assert_close(_attend_images_together(query, keys, values, 0.3, bias), expected)


def clip() -> Llava:
    return from_transformers(random_model(tiny_config(), seed=1))


def test_each_number_of_images_has_a_graph(monkeypatch):
    """Results outlive the next replay."""
    monkeypatch.setattr(features, "capture", Replayed)
    encoder = clip().vision
    graphs = VisionGraphs(encoder._encode, encoder.projector)
    asked = [(pixels(count, seed=seed), ratio) for seed, (count, ratio) in enumerate([(1, 1.0), (3, 1.0), (1, 0.5), (1, 1.0)])]
    found = [graphs(*one) for one in asked]
    for one, own in zip(asked, found, strict=True):
        expected = encoder(*one)
        torch.testing.assert_close(own.tokens, expected.tokens)
        torch.testing.assert_close(own.attention, expected.attention)
    assert len(graphs.graphs) == 3


def test_beyond_the_most_graphs_none_is_made(monkeypatch):
    monkeypatch.setattr(features, "capture", Replayed)
    monkeypatch.setattr(features, "MOST_GRAPHS", 1)
    encoder = clip().vision
    graphs = VisionGraphs(encoder._encode, encoder.projector)
    for count in (1, 2):
        torch.testing.assert_close(graphs(pixels(count, 0), 1.0).tokens, encoder(pixels(count, 0)).tokens)
    assert len(graphs.graphs) == 1


def test_where_a_graph_fails_the_encoder_runs(monkeypatch):
    monkeypatch.setattr(features, "capture", lambda *args: None)
    encoder = clip().vision
    found = VisionGraphs(encoder._encode, encoder.projector)(pixels(1, 0), 1.0)
    torch.testing.assert_close(found.tokens, encoder(pixels(1, 0)).tokens)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "ratio"), [("llava", 1.0), ("llava", 0.5), ("llava_onevision", 1.0), ("llava_onevision", 0.5), ("smol", 1.0)]
)
def test_a_graph_equals_the_encoder(family, ratio):
    """CLIP, SigLIP, and the convolutional tower of `smol`, which has no patches to merge."""
    config = convolutional() if family == "smol" else tiny_config(family=family, tower="clip" if family == "llava" else "siglip")
    encoder = from_transformers(random_model(config, seed=1).cuda()).vision
    size = config.vision_config.image_size
    for count in (1, 3, 1):
        pictures = torch.randn(count, 3, size, size, device="cuda")
        with torch.inference_mode():
            found, expected = encoder(pictures, ratio), encoder._encode(pictures, ratio)
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-3, atol=1e-4)
    assert all(encoder._graphs.graphs.values()), "it was captured"
