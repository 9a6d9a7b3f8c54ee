"""The native pass of few rows against the same layers run one by one, with AVX-512 and with what any processor has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models import kernels
from models.forward import SequenceInput, forward
from models.kernels import thresholds
from models.linear import Linear
from models.llava import Llava, from_transformers
from models.random_llava import random_model, text_config, tiny_config
from models.route import Route
from models.sparse import PackedLinear, SparseLinear
from tests.models.test_forward import routes
from tests.models.tiny_llava import VISUAL, Session, pixels, prompt

pytestmark = pytest.mark.skipif(kernels.decoding_library() is None, reason="needs the native step")
avx512 = pytest.mark.skipif(kernels.library() is None, reason="needs AVX-512 BF16")
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 0.05, "atol": 0.05}}


@pytest.fixture(params=[pytest.param("AVX-512", marks=avx512), "portable"])
def instructions(request, monkeypatch):
    if request.param == "portable":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return request.param


def build(dtype=torch.float32, kind="llama", bias=False, quantization: str | None = None, **sizes: int) -> Llava:
    config = tiny_config(kind, bias=bias)
    common = {"layers": 3, "width": 48, "ffn": 100, "heads": 4, "kv_heads": 2, "vocab": 131, "bias": bias}
    config.text_config = text_config(kind, **(common | sizes))
    return from_transformers(random_model(config, seed=1, dtype=dtype), quantization)


def sessions(model: Llava) -> list[Session]:
    """A prompt for every kind of route, all of another length, run; each is about to decode."""
    made = [
        Session(model, prompt(1, 3 + 5 * i, seed=i), pixels(1, seed=i).to(model.dtype), route)
        for i, route in enumerate(routes().values())
    ]
    made.append(Session(model, prompt(0, 1, seed=9), None))
    forward(model, [session.input for session in made])
    for i, session in enumerate(made):
        session.push(3 + i)
    return made


def parts(model: Llava, sizes: list[int], logits: int) -> list[list[SequenceInput]]:
    """Passes over prompts of every kind of route that freezes no layers: first tokens, then parts of `sizes`, then the rest."""
    passes: list[list[SequenceInput]] = [[] for _ in range(len(sizes) + 2)]
    for i, route in enumerate(route for route in routes().values() if not route.frozen_layers):
        session = Session(model, prompt(1, 40, seed=i), pixels(1, seed=i).to(model.dtype), route)
        left = replace(session.input, logits_to_keep=logits)
        for step, size in enumerate([1 + i, *sizes]):
            passes[step].append(left.first(size))
            left = left.behind(size)
        passes[-1].append(left)
    return passes


def beside_ends(model: Llava) -> list[SequenceInput]:
    """Ends of prompts whose beginnings have run, and answers."""
    beginnings, ends = parts(model, [], logits=2)
    assert not len(forward(model, beginnings)), "no logits before the end"
    return [*ends, *(session.input for session in some(model))]


def layer_by_layer(model: Llava) -> Llava:
    other = replace(model)
    other.__dict__["decode_plan"] = None
    return other


KINDS = pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {}),
        ("llama", {"bias": True, "heads": 9, "kv_heads": 3, "width": 576, "ffn": 200, "layers": 3}),
        ("llama", {"heads": 4, "kv_heads": 4, "width": 64 * 4 + 40}),  # heads of 74
        ("qwen2", {"heads": 14, "kv_heads": 2, "width": 14 * 32}),
        ("mistral", {"heads": 8, "kv_heads": 1, "width": 8 * 160}),
    ],
)


@KINDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_equals_layer_by_layer_at_every_route(dtype, kind, sizes, instructions):
    model = build(dtype, kind, **sizes)
    assert model.decode_plan and model.decode_plan.instructions == instructions
    theirs, ours = sessions(model), sessions(model)
    for step in range(3):
        wanted = forward(layer_by_layer(model), [session.input for session in theirs])
        found = forward(model, [session.input for session in ours])
        torch.testing.assert_close(found, wanted, **TOLERANCE[dtype])
        for one, other in zip(theirs, ours, strict=True):
            assert one.cache.lengths == other.cache.lengths
            for session in (one, other):
                session.push(20 + step)


@avx512
@KINDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_8_bits_equal_layer_by_layer(dtype, kind, sizes):
    """Alone and in batches that are multiplied in another way, at every route."""
    model = build(dtype, kind, quantization="int8", **sizes)
    assert model.decode_plan
    theirs, ours = ([*sessions(model), *sessions(model)] for _ in range(2))
    wanted = [forward(layer_by_layer(model), [session.input])[0] for session in theirs]
    found = forward(model, [session.input for session in ours])
    # A code in thousands is another where attention's last digits are.
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0.05, atol=0.05)


@avx512
def test_4_bits_equal_layer_by_layer():
    model = build(torch.bfloat16, "qwen2", quantization="nf4", width=128, ffn=192, heads=4, kv_heads=2)
    assert model.decode_plan
    theirs, ours = sessions(model), sessions(model)
    wanted = forward(layer_by_layer(model), [session.input for session in theirs])
    found = forward(model, [session.input for session in ours])
    torch.testing.assert_close(found, wanted, **TOLERANCE[torch.bfloat16])


@KINDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_parts_of_prompts_equal_layer_by_layer(dtype, kind, sizes, instructions, monkeypatch):
    monkeypatch.setattr(thresholds, "decode_rows", lambda *_, **__: 1000)
    model = build(dtype, kind, **sizes)
    theirs, ours = parts(model, [9, 2, 1], logits=3), parts(model, [9, 2, 1], logits=3)
    for wanted, found in zip(theirs, ours, strict=True):
        assert model.decode_plan and model.decode_plan.takes(found)
        torch.testing.assert_close(forward(model, found), forward(layer_by_layer(model), wanted), **TOLERANCE[dtype])
        for one, other in zip(wanted, found, strict=True):
            assert one.cache.lengths == other.cache.lengths
            for layer in (i for i, runs in enumerate(one.route.layers) if runs):
                torch.testing.assert_close(other.cache.keys(layer), one.cache.keys(layer), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_parts_are_the_same_bit_for_bit_beside_answers(dtype, instructions, monkeypatch):
    monkeypatch.setattr(thresholds, "decode_rows", lambda *_, **__: 1000)
    model = build(dtype, heads=9, kv_heads=3, width=576)
    alone = [forward(model, [one]) for one in beside_ends(model)]
    assert torch.equal(forward(model, beside_ends(model)), torch.cat(alone))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_a_row_is_the_same_bit_for_bit_in_any_batch(dtype, instructions):
    model = build(dtype, heads=9, kv_heads=3, width=576)
    alone = [forward(model, [session.input])[0] for session in sessions(model)]
    for count in (2, 3, 5, len(alone)):
        together = forward(model, [session.input for session in sessions(model)[-count:]])
        assert torch.equal(together, torch.stack(alone[-count:]))


def test_more_threads_than_cores_change_nothing(instructions, monkeypatch):
    """Threads that are taken off their cores hold chunks; others compute them once more."""
    monkeypatch.setattr(thresholds, "decode_rows", lambda *_, **__: 1000)
    model, before = build(torch.bfloat16, heads=9, kv_heads=3, width=576), torch.get_num_threads()
    batches = [beside_ends(model), [session.input for session in some(model)]]
    lengths = [[list(one.cache.lengths) for one in batch] for batch in batches]
    wanted = [forward(model, batch) for batch in batches]
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            for _ in range(20):
                for batch, known, logits in zip(batches, lengths, wanted, strict=True):
                    for one, rows in zip(batch, known, strict=True):
                        one.cache.lengths[:] = rows
                    assert torch.equal(forward(model, batch), logits)
    finally:
        torch.set_num_threads(before)


def some(model: Llava) -> list[Session]:
    """Sessions on caches that hold ones, which need no prompt to be run."""
    made = [Session(model, [1, 5, 6], None) for _ in range(3)]
    for session in made:
        for layer in range(model.num_layers):
            ones = torch.ones(9, model.kv_heads[layer], model.head_dim, dtype=model.dtype)
            session.cache.append(layer, ones, ones)
        session.push(7)
    return made


@avx512
def test_packed_weights_give_what_the_dense_ones_do(monkeypatch):
    monkeypatch.setattr(thresholds, "decode_rows", lambda *_, **__: 1000)
    model = build(torch.bfloat16, heads=9, kv_heads=3, width=576, ffn=200)
    for layer in model.decoder_layers:
        for matrix in layer.linears().values():
            matrix.weight *= torch.rand_like(matrix.weight) < 0.5
    packed = [replace(layer, **{name: PackedLinear.of(m) for name, m in layer.linears().items()}) for layer in model.decoder_layers]
    both = [forward(one, beside_ends(one)) for one in (model, replace(model, decoder_layers=packed))]
    assert torch.equal(*both)


def test_a_skipped_layer_is_not_read(instructions):
    model = build()
    route = Route(VISUAL, tuple(range(VISUAL)), (True, False, True))
    session = Session(model, prompt(1, 4, 1), pixels(1, 1), route)
    forward(model, [session.input])
    session.push(9)
    model.decoder_layers[1].qkv.weight.fill_(torch.nan)
    assert torch.isfinite(forward(model, [session.input])).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
def test_nan_is_not_hidden_and_harms_no_other_request(dtype, instructions):
    model = build(dtype)
    _, second, third = made = some(model)
    second.cache.keys(1)[:, 3] = torch.nan
    third.input.hidden[0, 5] = torch.nan
    found = forward(model, [session.input for session in made])
    assert torch.isfinite(found[0]).all()
    assert found[1:].isnan().all()


def test_a_full_cache_is_an_error_and_not_overrun(instructions):
    model = build()
    (session, *_) = some(model)
    session.cache.lengths[:] = session.cache.capacity
    with pytest.raises(RuntimeError, match="layer 0 has room for 35 rows, not 36"):
        forward(model, [session.input])


def test_what_the_native_step_does_not_take_runs_layer_by_layer(monkeypatch):
    model = build(torch.bfloat16)
    sparse = [replace(layer, qkv=SparseLinear.of(layer.qkv)) for layer in model.decoder_layers]
    assert replace(model, decoder_layers=sparse).decode_plan is None
    assert replace(model, norm=model.norm.half()).decode_plan is None
    assert replace(model, head=Linear(model.head.weight.float())).decode_plan is None
    monkeypatch.setattr(thresholds, "decode_rows", lambda *_, **__: 2)
    assert [model.decode_plan.takes([session.input for session in some(model)[:n]]) for n in (2, 3)] == [True, False]


def test_narrow_models_and_few_bits_take_more_rows_in_one_call():
    rows = thresholds.decode_rows
    assert rows(576, "bfloat16", int8=False) > rows(2048, "bfloat16", int8=False) == rows(576, "float32", int8=False)
    assert rows(576, "portable", int8=False) < rows(576, "float32", int8=False) < rows(576, "float32", int8=True)
