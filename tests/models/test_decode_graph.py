"""A step in one CUDA graph against the same layers run one by one. On a CPU it runs without a graph, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.decode_graph import BUCKETS, GraphPlan
from models.forward import forward
from models.llava import Llava, from_transformers
from models.random_llava import random_model, tiny_config
from models.route import Route
from tests.models.replayed import Replayed
from tests.models.test_forward import routes
from tests.models.tiny_llava import VISUAL, Session, pixels, prompt

attention_triton = pytest.importorskip("models.kernels.attention_triton", exc_type=ImportError)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
WHOLE = {name: route for name, route in routes().items() if all(route.layers) and name != "few"}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter takes milliseconds for each."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention_triton, "SPLITS", 2)


def build(plan: bool = True, kind: str = "llama") -> Llava:
    model = from_transformers(random_model(tiny_config(kind, kv_heads=1), seed=1, dtype=torch.float32).to(DEVICE))
    model.__dict__["decode_plan"] = GraphPlan.of(model) if plan else None
    return model


def sessions(model: Llava, wanted: dict[str, Route]) -> list[Session]:
    """A prompt for each route, all of another length, run; each is about to decode."""
    made = [
        Session(model, prompt(1, 3 + 5 * i, seed=i), pixels(1, seed=i).to(DEVICE), route) for i, route in enumerate(wanted.values())
    ]
    forward(model, [session.input for session in made])
    for i, session in enumerate(made):
        session.push(3 + i)
    return made


@pytest.mark.parametrize(("kind", "wanted"), [("llama", WHOLE), ("qwen2", routes())], ids=["whole", "layers skipped"])
def test_equals_layer_by_layer(wanted, kind):
    theirs, ours = sessions(build(plan=False, kind=kind), wanted), sessions(build(kind=kind), wanted)
    plan = ours[0].model.decode_plan
    for step in range(2):
        assert plan.takes([session.input for session in ours]) == (wanted is WHOLE)
        expected = forward(theirs[0].model, [session.input for session in theirs])
        found = forward(ours[0].model, [session.input for session in ours])
        torch.testing.assert_close(found, expected, **TOLERANCE)
        for one, other in zip(theirs, ours, strict=True):
            assert one.cache.lengths == other.cache.lengths
            for layer in (i for i, runs in enumerate(one.route.layers) if runs):
                torch.testing.assert_close(other.cache.keys(layer), one.cache.keys(layer), **TOLERANCE)
            for session in (one, other):
                session.push(20 + step)


def replayed(plan: GraphPlan, bucket: int) -> Replayed:
    """It sees what changed in the plan's tensors alone."""
    return Replayed(lambda: plan._run(bucket))


def test_requests_come_and_go_between_steps(monkeypatch):
    """Buckets of 4, 1 and 2; results of a step outlive the next one."""
    if DEVICE == "cpu":
        monkeypatch.setattr(GraphPlan, "_capture", replayed)
    theirs, ours = sessions(build(plan=False), WHOLE), sessions(build(), WHOLE)
    expected, found = [], []
    for count in (3, 1, 1, 2):
        for made, logits in ((theirs, expected), (ours, found)):
            logits.append(forward(made[0].model, [session.input for session in made[:count]]))
            for session in made[:count]:
                session.push(9)
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), **TOLERANCE)


def test_takes_a_new_token_each_where_all_layers_run():
    model = build()
    plan = model.decode_plan
    token = sessions(model, {"full": Route.full(VISUAL, 3)})[0].input
    assert plan.takes([token]) and plan.takes([token] * BUCKETS[-1])
    assert not plan.takes([token] * (BUCKETS[-1] + 1)), "more than the largest graph"
    assert not plan.takes([token, replace(token, logits_to_keep=0)]), "a part of a prompt"
    assert not plan.takes([Session(model, prompt(0, 4, seed=1), None).input])
    assert not plan.takes([replace(token, hidden=token.hidden.half())])


def test_a_full_cache_is_an_error_and_not_overrun():
    model = build()
    (session,) = sessions(model, {"full": Route.full(VISUAL, 3)})
    session.cache.lengths[:] = session.cache.capacity
    with pytest.raises(RuntimeError, match="layer 0 has room for"):
        forward(model, [session.input])


def test_where_its_kernels_fail_there_is_no_plan(monkeypatch):
    monkeypatch.setattr("models.kernels.attention_triton.append_and_attend", lambda *args: 1 / 0)
    assert GraphPlan.of(build(plan=False)) is None


@pytest.mark.gpu
def test_a_card_runs_graphs():
    model = build()
    made = sessions(model, WHOLE)
    for count in (1, 3):
        forward(model, [session.input for session in made[:count]])
    assert sorted(bucket for bucket, graph in model.decode_plan.graphs.items() if graph) == [1, 4]
