"""The GPU kernels against torch, in Triton's interpreter on a CPU: a process of its own, for Triton reads the switch once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import torch
from models.kernels import bitmask_triton
from models.linear import Linear
from models.sparse import SparseLinear

generator = torch.Generator().manual_seed(0)
for rows, inputs, outputs, biased in [(1, 128, 16, False), (16, 300, 37, True), (3, 31, 5, True), (2, 130, 16, False)]:
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.randn(outputs, inputs, generator=generator) * (torch.rand(outputs, inputs, generator=generator) < 0.5)
        bias = torch.randn(outputs, generator=generator).to(dtype) if biased else None
        x = torch.randn(rows, inputs, generator=generator).to(dtype)
        sparse = SparseLinear.of(Linear(weight.to(dtype), bias))
        if dtype != torch.bfloat16:  # of which Triton 3.9's interpreter multiplies the bits as whole numbers
            expected = torch.nn.functional.linear(x.float(), weight.to(dtype).float(), bias.float() if biased else None)
            got = bitmask_triton.multiply(x, sparse.values, sparse.masks, sparse.offsets, bias)
            torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.05)
        for first in (0, outputs // 2):
            out = torch.full((outputs - first, inputs), float("nan"), dtype=dtype)
            bitmask_triton.decompress(sparse.values, sparse.masks, sparse.offsets, first, out)
            assert torch.equal(out, weight.to(dtype)[first:])
"""


def test_the_kernels_equal_torch():
    pytest.importorskip("triton")
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
