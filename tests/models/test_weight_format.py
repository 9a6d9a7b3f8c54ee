"""The format of each matrix at load; the model answers the same in any."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import kernels, weight_format
from models.checkpoint import load
from models.forward import forward
from models.kernels.thresholds import SPARSE_FROM
from models.linear import Linear
from models.llava import Llava, from_transformers
from models.random_llava import random_model, tiny_config
from models.sparse import PackedLinear, SemiStructuredLinear, SparseLinear
from models.weight_format import choose_format, faster, is_2_4
from tests.models.tiny_llava import Session, pixels, prompt
from tests.server.tiny import write

native = pytest.mark.skipif(kernels.library() is None, reason="needs the native kernels")


def matrix(zeros: float, dtype: torch.dtype = torch.bfloat16) -> Linear:
    weight = torch.ones(20, 100, dtype=dtype)
    weight[:, : round(100 * zeros)] = 0
    return Linear(weight)


@native
@pytest.mark.parametrize(
    ("zeros", "kind"), [(0.0, Linear), (SPARSE_FROM - 0.01, Linear), (SPARSE_FROM, PackedLinear), (1.0, PackedLinear)]
)
def test_zeros_decide_on_a_cpu(zeros, kind):
    assert type(choose_format(matrix(zeros))) is kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes_without_a_kernel_stay_dense(dtype):
    assert type(choose_format(matrix(0.5, dtype))) is Linear


def test_without_kernels_all_stays_dense(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    assert type(choose_format(matrix(0.5))) is Linear


def test_is_2_4():
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(8, 64, generator=generator)
    assert is_2_4(random * torch.tensor([0, 1, 1, 0]).repeat(16))
    assert is_2_4(random * torch.tensor([0, 0, 1, 0]).repeat(16))
    assert not is_2_4(random * torch.tensor([0, 1, 1, 1, 0, 0, 0, 1]).repeat(8))
    assert not is_2_4(torch.zeros(8, 63))


def test_timing_decides_on_a_gpu(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="espalier")
    linear, times = matrix(0.5), {"bitmask": 1.0, "dense": 2.0}
    monkeypatch.setattr(weight_format, "seconds", lambda matrix, rows: times[matrix.format])
    assert type(faster(linear, SparseLinear)) is SparseLinear
    assert not caplog.messages
    times["bitmask"] = 2.0
    assert faster(linear, SparseLinear) is linear
    assert "bitmask of (20, 100) stays dense, which was measured to be faster at 1 rows" in caplog.messages[0]


def test_a_format_that_does_not_work_stays_dense(caplog):
    caplog.set_level(logging.INFO, logger="espalier")
    linear = matrix(0.5)
    assert faster(linear, SemiStructuredLinear) is linear  # not on a CPU
    assert faster(linear, SemiStructuredLinear) is linear
    assert len(caplog.messages) == 1
    assert "2:4 of (20, 100) does not work here" in caplog.messages[0]


@pytest.mark.parametrize("make", [lambda linear: linear, SparseLinear.of])
def test_a_product_is_timed(make):
    assert 0 < weight_format.seconds(make(matrix(0.5)), 1) < 1


def zeroed(seed: int = 1) -> torch.nn.Module:
    """A tiny bfloat16 LLaVA with 60 % of the language model's weights at zero, but for one matrix."""
    model = random_model(tiny_config(), seed=seed, dtype=torch.bfloat16)
    for name, weight in model.model.language_model.named_parameters():
        if weight.dim() == 2 and "embed" not in name and name != "layers.1.mlp.down_proj.weight":
            weight.data *= torch.rand(weight.shape) > 0.6
    return model


@torch.inference_mode()
def logits(model: Llava) -> torch.Tensor:
    """Of a prompt and of one token after it: [2, vocab]."""
    session = Session(model, prompt(1, 7, seed=1), pixels(1, seed=1).to(model.dtype))
    first = forward(model, [session.input])
    session.push(5)
    return torch.cat([first, forward(model, [session.input])])


@native
def test_pruned_weights_are_packed_and_answer_the_same(monkeypatch):
    sparse = from_transformers(zeroed())
    monkeypatch.setattr(weight_format, "choose_format", lambda linear: linear)
    dense = from_transformers(zeroed())
    compressed = {name for name, matrix in sparse.linears().items() if matrix.format == "packed"}
    assert compressed == {name for name in sparse.linears() if name.startswith("language.")} - {"language.1.down"}
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=0.02, atol=0.02)
    assert sparse.sparsity() == dense.sparsity()
    assert sparse.sparsity()["language"] == pytest.approx(0.6 * 11 / 12, abs=0.05)
    held = sparse.bytes_by_format()
    assert held["packed"] == sum(sparse.linears()[name].bytes for name in compressed)
    assert sum(held.values()) == sparse.weight_bytes < dense.weight_bytes
    assert set(dense.bytes_by_format()) == {"dense"}


@native
@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", "packed"), ("float32", "dense")])
def test_the_dtype_decides_the_format_of_a_pruned_checkpoint(tmp_path: Path, dtype: str, expected: str):
    directory = write(tmp_path / "pruned")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if "language_model" in name and "layers" in name and tensor.dim() == 2:
            tensor[:, ::2] = 0
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = load(directory, dtype=dtype).model
    assert {matrix.format for name, matrix in model.linears().items() if name.startswith("language.")} == {expected}
    assert {matrix.format for name, matrix in model.linears().items() if not name.startswith("language.")} == {"dense"}
