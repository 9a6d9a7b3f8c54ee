"""Our forward against transformers' on random models, and the promise that what is left out is not computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import kernels
from models.forward import forward
from models.linear import Linear
from models.llava import from_transformers
from models.random_llava import random_model, tiny_config
from models.route import Route
from tests.models.test_attention import flash
from tests.models.tiny_llava import IMAGE, VISUAL, Session, greedy, pair, pixels, prompt


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"kv_heads": 4}), ("llama", {"kv_heads": 2}), ("llama", {"bias": True}), ("mistral", {}), ("qwen2", {})],
)
@pytest.mark.parametrize("images", [0, 1, 3])
def test_matches_transformers_in_prefill_and_16_decode_steps(kind, options, images):
    reference, model = pair(kind, **options)
    ids, pics = prompt(images, 7, seed=2), pixels(images, seed=3)
    session = Session(model, ids, pics)
    for _ in range(17):
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([session.ids]), pixel_values=pics).logits[0, -1]
        got = forward(model, [session.input])[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        session.push(int(expected[:IMAGE].argmax()))  # an image token would ask for pixels


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_logits_in_bfloat16_are_not_rounded(quantization):
    """Rounded, the likeliest tokens are often equal, and then their numbers decide."""
    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = from_transformers(random_model(config, seed=1).bfloat16(), quantization)
    logits = model.logits(torch.randn(5, 48).bfloat16())
    assert (logits != logits.bfloat16().float()).float().mean() > 0.9


def routes() -> dict[str, Route]:
    return {
        "full": Route.full(VISUAL, 3),
        "few": Route(VISUAL, (0, 3, 7, 15), (True, True, True)),
        "skip": Route(VISUAL, tuple(range(VISUAL)), (True, False, True)),
        "both": Route(VISUAL, (5,), (False, True, True)),
        "blind": Route(VISUAL, (), (True, True, False)),
        "frozen": Route(VISUAL, (0, 3, 7, 8, 15), (True, True, True), frozen_layers=frozenset({0, 1})),
        "merged": Route(VISUAL, (0, 5, 10), (True, True, True), token_sizes=(3, 12, 1)),
    }


def test_a_mixed_batch_answers_as_each_request_alone():
    _, model = pair()
    asked = [(prompt(1, 3 + i, seed=i), pixels(1, seed=i), route) for i, route in enumerate(routes().values())]
    asked += [(prompt(0, 9, seed=9), None, None), (prompt(1, 1, seed=8), pixels(1, seed=8), None)]
    alone = [greedy([Session(model, *one)], 12)[0] for one in asked]
    assert greedy([Session(model, *one) for one in asked], 12) == alone


def test_requests_may_join_while_others_decode():
    _, model = pair()
    first, second = (prompt(1, 4, 1), pixels(1, 1)), (prompt(1, 6, 2), pixels(1, 2), routes()["both"])
    alone = [greedy([Session(model, *one)], 8)[0] for one in (first, second)]
    early, late = Session(model, *first), Session(model, *second)
    head = greedy([early], 3)[0]
    both = greedy([early, late], 5)
    assert head + both[0] == alone[0]
    assert both[1] == alone[1][:5]


@settings(max_examples=30)
@given(
    name=st.sampled_from(list(routes())), sizes=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_a_prompt_in_parts_is_the_prompt_as_a_whole(name, sizes, dtype):
    """Beside another request that answers; then it goes on as if nothing had been."""
    model = from_transformers(random_model(tiny_config("llama"), dtype=dtype))
    asked = prompt(1, 5, seed=6), pixels(1, seed=6).to(dtype), routes()[name]
    whole, parts, other = Session(model, *asked), Session(model, *asked), Session(model, prompt(0, 4, seed=1), None)
    wanted = [forward(model, [whole.input])]
    for size in sizes:
        if size < len(parts.input):
            assert len(forward(model, [other.input, parts.input.first(size)])) == 1, "no logits before the last part"
            parts.input = parts.input.behind(size)
            other.push(7)
    found = [forward(model, [other.input, parts.input])[1:]]
    for session, logits in ((whole, wanted), (parts, found)):
        session.push(9)
        logits.append(forward(model, [session.input]))
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(torch.cat(found), torch.cat(wanted), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["few", "both", "blind", "frozen", "merged"])
def test_dropping_equals_a_reference_that_masks(name):
    """transformers' layers run on all rows: dropped ones are masked as keys, and frozen ones are reset."""
    reference, model = pair()
    route, ids, pics = routes()[name], prompt(1, 5, seed=6), pixels(1, seed=6)
    got = forward(model, [replace(Session(model, ids, pics, route).input, logits_to_keep=3)])
    text = reference.model.language_model
    with torch.no_grad():
        features = torch.cat(list(reference.model.get_image_features(pics, vision_feature_layer=-2,
                             vision_feature_select_strategy="default").pooler_output))  # fmt: skip
        hidden = text.embed_tokens(torch.tensor([ids]))
        places = (torch.tensor(ids) == IMAGE).nonzero()[:, 0]
        hidden[0, places] = features
        positions = torch.arange(len(ids))[None]
        dropped = [int(places[i]) for i in range(VISUAL) if i not in route.kept_tokens]
        masked = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        masked[:, dropped] = False
        masked[dropped, dropped] = True  # a dropped row's own output is read by nobody
        for index, layer in enumerate(text.layers):
            if not route.layers[index]:
                continue
            mask = torch.zeros(masked.shape).masked_fill(~masked, -torch.inf)
            mask[:, places[list(route.kept_tokens)]] += torch.tensor(route.token_sizes or [1.0]).log()
            mask = mask[None, None]
            out = layer(hidden, attention_mask=mask, position_embeddings=text.rotary_emb(hidden, positions))
            changes = torch.ones(len(ids), dtype=torch.bool)
            changes[places] = index not in route.frozen_layers
            hidden[0, changes] = out[0, changes]
        expected = reference.lm_head(text.norm(hidden))[0, -3:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_parts", [False, True])
def test_prompts_in_one_call_of_a_flash_kernel_answer_alike(in_parts, monkeypatch):
    """The kernel is torch's SDPA in its place; nothing is left to be run request by request."""
    _, model = pair()
    calls = []

    def packed(*args: object, **options: object) -> torch.Tensor:
        calls.append(args)
        return flash(*args, **options)

    def logits() -> torch.Tensor:
        sessions = [Session(model, prompt(1, 3 + i, seed=i), pixels(1, seed=i), route) for i, route in enumerate(routes().values())]
        inputs = [replace(session.input, logits_to_keep=1 + i % 3) for i, session in enumerate(sessions)]
        if in_parts:
            assert not len(forward(model, [one.first(6) for one in inputs]))
            inputs = [one.behind(6) for one in inputs]
        return forward(model, inputs)

    wanted = logits()
    monkeypatch.setattr("models.attention.flash_attention", lambda: partial(packed, enable_gqa=True))
    monkeypatch.setattr("models.forward.packs", lambda query, kv_heads: True)
    monkeypatch.setattr("models.forward.attend", None)
    monkeypatch.setattr(kernels, "decoding_library", lambda: None)
    torch.testing.assert_close(logits(), wanted, rtol=1e-4, atol=1e-4)
    assert calls


def test_dropped_tokens_and_skipped_layers_cost_nothing(monkeypatch):
    """Layer by layer; tests of the native step see to it that it reads no layer that is skipped."""
    monkeypatch.setattr(kernels, "decoding_library", lambda: None)
    _, model = pair()
    names = {id(matrix): name for name, matrix in model.linears().items()}
    rows: Counter[str] = Counter()
    call = Linear.__call__

    def counting(self: Linear, x: torch.Tensor) -> torch.Tensor:
        rows[names[id(self)]] += len(x)
        return call(self, x)

    for name, route in routes().items():
        ids = prompt(1, 6, seed=5)
        session = Session(model, ids, pixels(1, seed=5), route)
        rows.clear()
        monkeypatch.setattr(Linear, "__call__", counting)
        forward(model, [session.input])
        session.push(9)
        forward(model, [session.input])
        monkeypatch.undo()
        expected = route.rows(len(ids))
        last = max(i for i, runs in enumerate(route.layers) if runs)
        for layer in range(3):
            decoded = int(route.layers[layer])
            assert rows[f"language.{layer}.qkv"] == expected[layer] + decoded, (name, layer)
            after = 1 if layer == last else expected[layer]  # the last layer goes on with the one row that is read
            if layer in route.frozen_layers and layer != last:
                after = len(ids) - VISUAL
            for matrix in ("out", "gate_up", "down"):
                assert rows[f"language.{layer}.{matrix}"] == after + decoded, (name, layer, matrix)
        assert rows["head"] == 2
        assert session.cache.lengths == [n + 1 if n else 0 for n in expected], name


def test_kv_memory_is_rows_times_layers_that_run():
    _, model = pair()
    row = 2 * model.kv_heads[0] * model.head_dim * 4
    for route in routes().values():
        cache = model.new_cache(route.rows(30))
        assert cache.nbytes == row * sum(route.rows(30))


def test_weights_are_held_once():
    """Fusing empties the modules as it goes; only the fused matrices remain."""
    source = random_model(tiny_config(), seed=1)
    from_transformers(source)
    assert source.model.language_model.layers[0].self_attn.q_proj.weight is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_the_gpu_answers_as_the_cpu_does(kind, dtype, tolerance):
    config = tiny_config(kind)
    asked = [(prompt(1, 3 + i, seed=i), pixels(1, seed=i), route) for i, route in enumerate(routes().values())]
    logits = []
    for device in ("cpu", "cuda"):
        model = from_transformers(random_model(config, seed=1, dtype=dtype).to(device))
        sessions = [Session(model, ids, pics.to(device, dtype), route) for ids, pics, route in asked]
        made = [forward(model, [s.input for s in sessions]).cpu()]
        for step in range(3):
            for session in sessions:
                session.push(20 + step)
            made.append(forward(model, [s.input for s in sessions]).cpu())
        logits.append(torch.cat(made))
    torch.testing.assert_close(*logits, rtol=tolerance, atol=tolerance)


def test_grouped_decode_attention_matches_repeated_heads():
    model = from_transformers(random_model(tiny_config(kv_heads=1), seed=2))
    assert greedy([Session(model, prompt(1, 5, 1), pixels(1, 1))], 4)[0]
