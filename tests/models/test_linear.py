"""Every weight format against torch in float32, with the native kernels where they run and without them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import kernels
from models.kernels import thresholds
from models.linear import Linear
from models.sparse import PackedLinear, SemiStructuredLinear, SparseLinear

SHAPES = st.tuples(st.integers(1, 200), st.integers(1, 600), st.integers(1, 70))  # rows, in, out


def problem(shape: tuple[int, int, int], kept: float, seed: int) -> tuple[torch.Tensor, Linear]:
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.rand(outputs, inputs, generator=generator) < kept
    bias = torch.randn(outputs, generator=generator).bfloat16() if seed % 2 else None
    return torch.randn(rows, inputs, generator=generator).bfloat16(), Linear(weight.bfloat16(), bias)


def reference(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    bias = None if linear.bias is None else linear.bias.float()
    return torch.nn.functional.linear(x.float(), linear.weight.float(), bias)


native = pytest.mark.skipif(kernels.library() is None, reason="needs the native kernels")
with_amx = pytest.mark.skipif(kernels.many_rows() != "amx", reason="needs a CPU with AMX")


@pytest.fixture(params=[*(pytest.param(name, marks=native) for name in ("native", "float32", "bfloat16")), "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    if request.param != "native":
        monkeypatch.setattr(kernels, "many_rows", lambda: "bfloat16" if request.param == "torch" else request.param)
    return request.param


@pytest.mark.parametrize("make", [lambda linear: linear, SparseLinear.of, PackedLinear.of], ids=["dense", "bitmask", "packed"])
def test_each_format_equals_float32(path, make):
    if make == PackedLinear.of and path == "torch":
        pytest.skip("only the kernels read it")

    @settings(max_examples=60)
    @given(SHAPES, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(0, 99))
    def check(shape, kept, seed):
        x, linear = problem(shape, kept, seed)
        torch.testing.assert_close(make(linear)(x).float(), reference(x, linear), rtol=0.02, atol=0.02 * shape[1] ** 0.5)

    check()


@pytest.mark.parametrize("bias", [False, True])
def test_unrounded_sums_are_those_of_float32(path, bias, monkeypatch):
    if path == "torch":
        monkeypatch.setattr(kernels, "unrounded_library", lambda: None)
    x, linear = problem((5, 576, 5000), 1.0, seed=int(bias))
    y = linear.unrounded(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, reference(x, linear), rtol=1e-5, atol=1e-4)


def test_a_sparse_weight_comes_back_as_it_was():
    _, linear = problem((1, 133, 37), 0.5, 1)
    assert torch.equal(SparseLinear.of(linear).dense(), linear.weight)


@native
@given(
    st.integers(1, 300), st.integers(1, 40), st.sampled_from([1, 3, 40, 256]), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 99)
)
def test_a_packed_weight_comes_back_bit_for_bit(inputs, outputs, high_bytes, kept, seed):
    """With more than 16 high bytes some have no code, with 256 nearly all."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(256, (outputs, inputs), generator=generator) + 256 * torch.randint(
        high_bytes, (outputs, inputs), generator=generator
    )
    bits[torch.rand(outputs, inputs, generator=generator) >= kept] = 0
    bits[bits == 1 << 15] = 0
    weight = bits.to(torch.uint16).view(torch.bfloat16)
    packed = PackedLinear.of(Linear(weight))
    assert torch.equal(packed.dense().view(torch.int16), weight.view(torch.int16))
    assert torch.equal(packed.dense(slice(3, 7)).view(torch.int16), weight[3:7].view(torch.int16))
    assert packed.nonzeros == int((bits != 0).sum())


@native
@given(SHAPES, st.integers(0, 99))
def test_exceptions_without_a_code_are_multiplied(shape, seed):
    x, linear = problem(shape, 0.5, seed)
    linear.weight *= 2.0 ** torch.randint(-30, 1, linear.weight.shape)
    torch.testing.assert_close(PackedLinear.of(linear)(x).float(), reference(x, linear), rtol=0.02, atol=0.02 * shape[1] ** 0.5)


@pytest.mark.parametrize(("kind", "share"), [(SparseLinear, 0.60), (PackedLinear, 0.46)])
def test_half_the_weights_take_about_half_the_bytes(kind, share):
    _, linear = problem((1, 1024, 512), 0.5, 0)
    assert kind.of(linear).bytes <= share * linear.bytes


@pytest.mark.parametrize("rows", [2, 4, 9])
def test_nan_is_not_hidden_and_harms_no_other_row(path, rows):
    x, linear = problem((rows, 64, 8), 1.0, 0)
    x[1, 3] = torch.nan
    out = linear(x)
    assert torch.isfinite(out[[i for i in range(rows) if i != 1]]).all()
    assert out[1].isnan().all()


@native
@pytest.mark.parametrize("inputs", [2048, 2500])
def test_a_row_is_the_same_in_any_batch_and_format_without_amx(inputs, monkeypatch):
    monkeypatch.setattr(kernels, "many_rows", lambda: "bfloat16")
    x, linear = problem((32, inputs, 50), 0.5, 1)
    whole_batch = PackedLinear.of(linear)(x)
    for rows in (1, 2, 5, 8):
        assert torch.equal(linear(x[:rows]), whole_batch[:rows])


@native
@pytest.mark.parametrize("inputs", [2048, 2500])
def test_a_row_is_the_same_in_any_large_batch_in_float32(inputs, monkeypatch):
    monkeypatch.setattr(kernels, "many_rows", lambda: "float32")
    x, linear = problem((700, inputs, 50), 0.5, 1)
    for matrix in (linear, PackedLinear.of(linear)):
        whole_batch = matrix(x)
        for rows in (65, 129, 640):
            assert torch.equal(matrix(x[-rows:]), whole_batch[-rows:])


@with_amx
@pytest.mark.parametrize("inputs", [2048, 2500])
def test_a_row_is_the_same_in_any_batch_and_format_with_amx(inputs):
    x, linear = problem((thresholds.PACKED["amx"], inputs, 50), 0.5, 1)
    packed = PackedLinear.of(linear)
    whole_batch = packed(x)
    for rows in (thresholds.AMX_SMALL_SPLIT + 1, thresholds.AMX_SMALL, 17, 250):
        assert torch.equal(packed(x[-rows:]), whole_batch[-rows:])
    for rows in (thresholds.AMX_SMALL_SPLIT + 1, thresholds.AMX_SMALL, thresholds.DENSE_AMX):
        assert torch.equal(linear(x[-rows:]), whole_batch[-rows:])
    few = packed(x[-thresholds.AMX_SMALL_SPLIT :])
    for rows in range(2, thresholds.AMX_SMALL_SPLIT):
        assert torch.equal(packed(x[-rows:]), few[-rows:])
    for rows in range(thresholds.AMX_FROM["dense"], thresholds.AMX_SMALL_SPLIT + 1):
        assert torch.equal(linear(x[-rows:]), few[-rows:])
    assert torch.equal(packed(x[-1:]), linear(x[-1:]))


@with_amx
def test_torch_uses_amx_before_and_after_our_kernels():
    """Both configure the tiles of threads that the other uses too."""
    x, linear = problem((thresholds.DENSE_AMX, 512, 512), 0.5, 1)
    first = torch.nn.functional.linear(x, linear.weight, linear.bias)
    ours = linear(x)
    assert torch.equal(torch.nn.functional.linear(x, linear.weight, linear.bias), first)
    assert torch.equal(linear(x), ours)


@pytest.mark.parametrize("kind", [SparseLinear, pytest.param(PackedLinear, marks=native)])
def test_many_rows_are_multiplied_part_by_part(kind, monkeypatch):
    monkeypatch.setattr(kernels, "many_rows", lambda: "bfloat16")
    x, linear = problem((100, 130, 60), 0.5, 1)
    whole = kind.of(linear)(x)
    monkeypatch.setattr("models.kernels.thresholds.DENSE_PART", 7)
    torch.testing.assert_close(kind.of(linear)(x), whole)


def test_only_weights_of_16_bits_are_held_sparse():
    _, linear = problem((1, 64, 8), 0.5, 0)
    half = Linear(linear.weight.half())
    assert torch.equal(SparseLinear.of(half).dense(), half.weight)
    with pytest.raises(ValueError, match="only bfloat16 and float16"):
        SparseLinear.of(Linear(torch.zeros(4, 4)))
    with pytest.raises(ValueError, match="only bfloat16 weights on the CPU are held packed"):
        PackedLinear.of(half)


def test_a_packed_weight_needs_the_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)
    x, linear = problem((3, 64, 8), 0.5, 0)
    with pytest.raises(RuntimeError, match="native CPU kernels"):
        PackedLinear.of(linear)(x)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("kind", [SparseLinear, SemiStructuredLinear])
def test_formats_on_a_gpu_equal_float32(rows, kind):
    x, linear = problem((rows, 256, 128), 1.0, 1)
    linear.weight *= torch.tensor([1, 0, 1, 0]).repeat(64)
    on_gpu = kind.of(Linear(linear.weight.cuda(), linear.bias.cuda()))
    torch.testing.assert_close(on_gpu(x.cuda()).float().cpu(), reference(x, linear), rtol=0.02, atol=0.3)
    assert on_gpu.nonzeros == on_gpu.size // 2
    assert on_gpu.bytes <= 0.60 * linear.bytes
