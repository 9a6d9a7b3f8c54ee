"""How much each layer changes the hidden state: what is measured, on which questions, and where it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from models.checkpoint import load
from models.errors import CheckpointError
from models.manifest import read_manifest
from pruning.layer_importance import calibrate, layer_change
from pruning.samples import DataError
from tests.server.tiny import LAYERS, ask, new_engine, write


def test_a_layer_that_does_nothing_changes_nothing(tmp_path: Path) -> None:
    checkpoint = load(write(tmp_path / "tiny"), dtype="float32")
    idle = checkpoint.model.decoder_layers[1]
    idle.out.weight.zero_()
    idle.down.weight.zero_()
    requests = [ask(new_engine(checkpoint), (picture,)) for picture in range(3)]
    found = layer_change(checkpoint.model, [(request.prompt, request.images[0].picture) for request in requests])
    assert found[1] == pytest.approx(0, abs=1e-5)
    assert found[0] > 0.01
    assert found[-1] == 1.0, "the last layer is read by nothing it could be compared with"


def test_it_is_measured_on_the_data_and_stored_in_the_manifest(tmp_path: Path) -> None:
    directory = write(tmp_path / "tiny")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "data.jsonl").write_text(json.dumps({"image": "red.png", "question": "What color is it?"}) + "\n")
    data = str(tmp_path / "data.jsonl")
    calibrate(directory, data, 1, 5, quiet=True)
    found = read_manifest(directory).calibration
    assert found is not None
    assert (found.data, found.samples, found.seed, len(found.layer_change)) == (data, 1, 5, LAYERS)
    with pytest.raises(DataError, match="has 1 pictures and 2 are asked for"):
        calibrate(directory, data, 2, 5, quiet=True)


def test_layers_that_overflow_are_told_and_nothing_is_stored(tmp_path: Path) -> None:
    directory = write(tmp_path / "tiny")
    weights = load_file(directory / "model.safetensors")
    [name] = [key for key in weights if key.endswith("layers.1.mlp.down_proj.weight") and "language" in key]
    save_file(weights | {name: weights[name] * 1e7}, directory / "model.safetensors", {"format": "pt"})
    before = read_manifest(directory)
    with pytest.raises(CheckpointError, match="not finite in float16; use another --dtype"):
        calibrate(directory, "world", 1, 0, dtype="float16", quiet=True)
    assert read_manifest(directory) == before
    calibrate(directory, "world", 1, 0, dtype="float32", quiet=True)
