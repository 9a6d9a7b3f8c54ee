"""The products with a bitmask weight against torch: on a card, or in Triton's interpreter on a CPU."""

from __future__ import annotations

import pytest
import torch

from models.linear import Linear
from models.sparse import SparseLinear

bitmask_triton = pytest.importorskip("models.kernels.bitmask_triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "biased"), [(1, 128, 16, False), (16, 300, 37, True), (3, 31, 5, True), (2, 130, 16, False)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_equal_torch(rows, inputs, outputs, biased, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * (torch.rand(outputs, inputs, generator=generator) < 0.5)
    weight = weight.to(DEVICE, dtype)
    bias = torch.randn(outputs, generator=generator).to(DEVICE, dtype) if biased else None
    x = torch.randn(rows, inputs, generator=generator).to(DEVICE, dtype)
    sparse = SparseLinear.of(Linear(weight, bias))
    if DEVICE == "cuda" or dtype != torch.bfloat16:  # of which Triton 3.9's interpreter multiplies the bits as whole numbers
        expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float() if bias is not None else None)
        got = bitmask_triton.multiply(x, sparse.values, sparse.masks, sparse.offsets, bias)
        torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.05)
    for first in (0, outputs // 2):
        out = torch.full((outputs - first, inputs), float("nan"), dtype=dtype, device=DEVICE)
        bitmask_triton.decompress(sparse.values, sparse.masks, sparse.offsets, first, out)
        assert torch.equal(out, weight[first:])
