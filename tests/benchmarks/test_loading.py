"""What is written to be loaded is a checkpoint, in shards, and the figures are there."""

from __future__ import annotations

from pathlib import Path

from benchmarks.loading import measure, write
from models.checkpoint import load, weight_files
from models.random_llava import geometry_config


def test_a_geometry_is_written_loaded_and_measured(tmp_path: Path) -> None:
    config = geometry_config("tinyllava-1.1b")
    config.text_config.num_hidden_layers, config.vision_config.num_hidden_layers = 1, 2
    config.text_config.hidden_size = config.text_config.intermediate_size = 256
    config.text_config.head_dim = 8
    write(tmp_path, config, 8_000_000)
    assert len(weight_files(tmp_path)) > 2
    assert load(tmp_path).model.num_layers == 1
    found = measure(tmp_path, 1)
    assert found["file_bytes"] > 20e6 and found["read_s"] >= 0 and found["load_s"] > 0 and found["peak_over_weights"] > 0
