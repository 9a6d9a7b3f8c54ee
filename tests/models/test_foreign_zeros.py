"""Weights that were pruned elsewhere: plain safetensors with zeros, as llm-compressor, SparseGPT and Wanda leave them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from evals import inspect
from models import kernels
from models.checkpoint import load
from server.request import PreparedImage, Request, Sampling
from tests.models.hub import hub_config, write_hub
from tests.models.saved import edit, edit_tensors, fails, put
from tests.models.test_families import chat, photograph
from tests.server.tiny import Reader, drain, new_engine

ABOUT: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "frozen",
    "sparsity_config": {"format": "dense", "global_sparsity": 0.5, "sparsity_structure": "unstructured", "targets": ["Linear"]},
}  # fmt: skip
"""What llm-compressor writes into `config.json` beside a `recipe.yaml`."""


def prune(tensors: dict[str, torch.Tensor]) -> None:
    """Half of the weights of the decoder layers, the smallest ones of each row, in bfloat16."""
    for name, tensor in tensors.items():
        if name.startswith("language_model.model.layers") and tensor.dim() == 2:
            tensor[tensor.abs() < tensor.abs().median(1, keepdim=True).values] = 0
        tensors[name] = tensor.bfloat16()


@pytest.fixture(name="pruned")
def pruned_elsewhere(tmp_path: Path) -> Path:
    directory = write_hub(tmp_path / "pruned", hub_config("llava", "llama"))
    edit_tensors(directory, prune)
    edit(directory / "config.json", put("quantization_config", value=ABOUT))
    edit(directory / "config.json", put("dtype", value="bfloat16"))
    (directory / "recipe.yaml").write_text("default_stage:\n  default_modifiers:\n    SparseGPTModifier: {sparsity: 0.5}\n")
    return directory


def test_zeros_from_elsewhere_are_packed_and_reported(pruned, capsys):
    model = load(pruned).model
    assert 0.45 < model.sparsity()["language"] < 0.52
    assert model.sparsity()["vision"] < 0.01
    if kernels.library():
        assert {matrix.format for name, matrix in model.linears().items() if name.startswith("language")} == {"packed"}
    inspect.run(pruned)
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r"pruned elsewhere, for nothing is told of it; zeros: language (4|5)\d\.\d%, vision 0", told), told


def test_zeros_from_elsewhere_are_served_at_any_level(pruned):
    loaded = load(pruned)
    engine = new_engine(loaded)
    image = PreparedImage(loaded.preprocessor.picture(photograph(40, 40)), "a")
    for number, level in enumerate(("off", "strong")):
        reader = Reader()
        engine.submit(Request(str(number), loaded.preprocessor.prompt(chat(1)), [image], level, Sampling(max_tokens=4), reader))
        drain(engine)
        assert reader.finished.completion_tokens > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "pack-quantized", "config_groups": {"group_0": {}}}, "compressed (pack-quantized)"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "compressed (sparse-24-bitmask)"),
    ],
)
def test_compressed_weights_say_how_to_save_them(pruned, change, words):
    edit(pruned / "config.json", put("quantization_config", value=ABOUT | change))
    fails(pruned, words, "save_compressed=False")
