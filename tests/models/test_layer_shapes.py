"""Layers of different shapes: their cost, and what is wrong in the configuration."""

from __future__ import annotations

import json
import re

import pytest
import torch

from models.checkpoint import load
from models.errors import CheckpointError
from models.flops import prefill_flops
from models.kv_cache import RequestCache
from models.llava import UnsupportedCheckpoint
from models.random_llava import tiny_config
from models.route import Route
from tests.models.tiny_llava import VISUAL
from tests.server.tiny import write


def test_flops_and_memory_are_those_of_the_shapes():
    config = tiny_config()
    route = Route.full(VISUAL, 3)
    dense = prefill_flops(config, route, 30)
    config.text_config.layer_shapes = [{"kv_heads": 2, "ffn": 96}, {"kv_heads": 1, "ffn": 40}, {"kv_heads": 2, "ffn": 96}]
    gone = 30 * (48 * 12 * (2 + 2 + 2) + 3 * 48 * 56) + 30 * 2 * 12 * 30
    assert dense - prefill_flops(config, route, 30) == 2 * gone
    cache = RequestCache([5, 0, 7], [2, 1, 1], 12, torch.float32, torch.device("cpu"))
    assert cache.nbytes == 4 * 2 * 12 * (5 * 2 + 7)


@pytest.mark.parametrize(
    "value",
    [
        3,
        [],
        [{"kv_heads": 2, "ffn": 96}],
        [{"kv_heads": 0, "ffn": 96}] * 3,
        [{"kv_heads": 2}] * 3,
        [{"kv_heads": 2, "ffn": "9"}] * 3,
    ],
)
@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_a_malformed_key_is_refused(section, value, tmp_path):
    path = write(tmp_path / "broken") / "config.json"
    document = json.loads(path.read_text())
    document[section]["layer_shapes"] = value
    path.write_text(json.dumps(document))
    with pytest.raises(UnsupportedCheckpoint, match=r"config\.json: layer_shapes"):
        load(path.parent)


@pytest.mark.parametrize(
    ("section", "neurons", "matrix"),
    [("text_config", (96, 88, 96), "layers.1.mlp.gate_proj"), ("vision_config", (64, 56), "layers.1.mlp.fc1")],
)
def test_shapes_that_the_files_do_not_have_are_refused(section, neurons, matrix, tmp_path):
    path = write(tmp_path / "broken") / "config.json"
    document = json.loads(path.read_text())
    document[section]["layer_shapes"] = [{"kv_heads": 2, "ffn": n} for n in neurons]
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=rf"another shape: .*{re.escape(matrix)}"):
        load(path.parent)
