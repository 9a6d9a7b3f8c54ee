"""The gradient through the frozen model: of the route that is served, and it teaches the corrector."""

from __future__ import annotations

import pytest
import torch

from models.checkpoint import load, open_transformers
from pruning.answers import Prompt, log_probabilities
from pruning.dynamic.levels import OperatingPoint
from pruning.dynamic.planner import make_route
from pruning.dynamic.router import Router, RouterConfig, score_request
from pruning.dynamic.training.dataset import MIN_REST
from pruning.dynamic.training.distill import divergence
from tests.pruning.dynamic.tiny_router import plain_checkpoint, router_dataset  # noqa: F401
from tests.server.tiny import LAYERS, VISUAL


@pytest.mark.parametrize(("keep", "frozen"), [(VISUAL, 0), (VISUAL, 1), (20, 0), (20, 1)])
def test_what_is_learned_from_is_the_route_that_is_served(plain, data, keep, frozen):
    """Through transformers' model while learning, through the packed forward when serving: merged, sized and frozen alike."""
    checkpoint = load(plain)
    torch.manual_seed(1)
    router = Router(RouterConfig(48, LAYERS, 16)).requires_grad_(False)
    if keep < VISUAL:  # where all stay, nothing is corrected
        torch.nn.init.normal_(router.corrector.out.weight, std=0.3)
    teacher = open_transformers(plain).model
    teacher.set_attn_implementation("eager")
    learned = divergence(router, teacher, data.of(torch.arange(5)), keep, frozen)
    served = torch.stack([served_divergence(checkpoint, router, data, number, keep, frozen) for number in range(5)])
    torch.testing.assert_close(learned, served.clamp_max(20), rtol=2e-2, atol=2e-3)
    if (keep, frozen) == (VISUAL, 0):
        assert learned.abs().max() < 2e-3
    else:
        assert learned.max() > 0.01


def served_divergence(checkpoint, router, data, number, keep, frozen):
    """KL over the likely tokens and the rest, from our own forward."""
    prompt, text, own = data.example(number, checkpoint.model.config.image_token_id)
    routing = score_request(router, checkpoint.model, [prompt.image], text)
    route, visual = make_route(OperatingPoint(keep / VISUAL, 0, frozen), [prompt.image], LAYERS, None, routing)
    assert (len(route.kept_tokens), len(route.frozen_layers)) == (keep, frozen)
    (found,) = log_probabilities(checkpoint.model, [Prompt(prompt.ids, visual)], [own], [route])
    count = len(own)
    here = found.gather(-1, data.top_tokens[number, :count].long())
    rest = torch.log1p(-here.exp().sum(-1, keepdim=True).clamp_max(1 - MIN_REST))
    wanted = data.log_probabilities[number, :count]
    return (wanted.exp() * (wanted - torch.cat([here, rest], -1))).sum()


def test_learning_to_correct_lowers_the_divergence(plain, data):
    torch.manual_seed(0)
    router = Router(RouterConfig(48, LAYERS, 16))
    teacher = open_transformers(plain).model.requires_grad_(False)
    teacher.set_attn_implementation("eager")
    some = data.of(torch.arange(12))
    optimizer = torch.optim.AdamW(router.corrector.parameters(), 3e-3)
    course = []
    for _ in range(40):
        loss = divergence(router, teacher, some, 12, 0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(float(loss.detach()))
    assert course[-1] < 0.7 * course[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
