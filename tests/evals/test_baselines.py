"""Choices of visual tokens without a router: how many stay, which, and what they hold.

FastV against transformers: the tokens that it keeps, and what the model says when the others are masked.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evals.baselines import FASTV_LAYER, TOKEN_BASELINES, fastv, fastv_ratio, keep_tokens
from models.flops import flops_ratio
from models.llava import from_transformers
from models.random_llava import random_model, tiny_config
from models.route import Route
from models.vision.features import ImageFeatures

IMAGE, VISUAL = 127, 16
policies = st.sampled_from(TOKEN_BASELINES)
totals = st.one_of(st.integers(1, 14).map(lambda side: side * side), st.integers(1, 200))


def picture(tokens: Tensor, attention: Tensor | None = None) -> ImageFeatures:
    shown = torch.ones(len(tokens)) if attention is None else attention
    return ImageFeatures(tokens[None], shown[None])


def features(total: int, seed: int = 0, width: int = 6) -> ImageFeatures:
    generator = torch.Generator().manual_seed(seed)
    return picture(torch.randn(total, width, generator=generator), torch.rand(total, generator=generator).softmax(-1))


def grid(side: int) -> Tensor:
    """Tokens that hold their own column and row."""
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([xs.flatten(), ys.flatten()], dim=-1).float()


@given(policy=policies, total=totals, data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_every_policy_keeps_what_it_is_told_in_order_and_once(policy, total, data, seed):
    keep = data.draw(st.integers(1, total + 5))
    image = features(total, seed % 7)
    before = image.tokens.clone()
    chosen = keep_tokens(policy, image, keep, seed)
    kept = chosen.indices.tolist()
    assert chosen.indices.dtype == torch.long
    assert kept == sorted(set(kept))
    assert 0 <= kept[0] <= kept[-1] < total
    assert 1 <= len(kept) <= keep if policy == "pooling" else len(kept) == min(keep, total)
    assert chosen.tokens.shape == image.tokens[0].shape
    assert torch.equal(image.tokens, before)
    assert keep_tokens(policy, image, keep, seed).indices.tolist() == kept, "the same picture keeps the same tokens"


@pytest.mark.parametrize("policy", [policy for policy in TOKEN_BASELINES if policy != "pooling"])
def test_identical_tokens_are_still_chosen_once(policy):
    kept = keep_tokens(policy, picture(torch.ones(36, 4), torch.full((36,), 1 / 36)), 20, seed=0).indices.tolist()
    assert len(set(kept)) == 20


def test_random_follows_its_seed():
    first, other = (keep_tokens("random", features(144), 24, seed).indices.tolist() for seed in (1, 2))
    assert first != other


def test_an_unknown_policy_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match="'psychic' is not one of merging, divprune"):
        keep_tokens("psychic", features(144), 24, 0)


def test_cls_diversity_keeps_what_the_class_token_looks_at():
    image = features(144)
    kept = set(keep_tokens("cls_diversity", image, 24, seed=0).indices.tolist())
    assert kept >= set(image.attention[0].topk(12).indices.tolist())
    assert keep_tokens("cls_diversity", image, 1, seed=0).indices.tolist() == [int(image.attention[0].argmax())]


def test_cls_diversity_says_that_there_is_no_class_token():
    with pytest.raises(ValueError, match="this vision tower has none"):
        keep_tokens("cls_diversity", ImageFeatures(features(144).tokens), 24, 0)


def test_cls_diversity_finds_the_odd_one_that_nobody_looks_at():
    tokens = F.one_hot(torch.zeros(100, dtype=torch.long), 4).float()
    tokens[17] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    tokens[63] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    attention = torch.linspace(1, 0, 100)
    attention[[17, 63]] = 0.0
    assert {17, 63} <= set(keep_tokens("cls_diversity", picture(tokens, attention), 6, seed=0).indices.tolist())


@pytest.mark.parametrize("keep", [4, 9, 16, 24, 48, 96])
def test_uniform_covers_the_picture(keep):
    side = 12
    tokens = grid(side)
    kept = tokens[keep_tokens("uniform", picture(tokens), keep, seed=0).indices]
    corners = torch.tensor([[0.0, 0.0], [side - 1, 0], [0, side - 1], [side - 1, side - 1]])
    reach = side / keep**0.5  # no corner is further from a kept token than the spacing allows
    assert torch.cdist(corners, kept).min(dim=1).values.max() <= reach
    assert torch.allclose(kept.mean(0), torch.full((2,), (side - 1) / 2), atol=1.0)


@given(side=st.integers(1, 14), data=st.data())
def test_pooling_makes_means_of_square_cells(side, data):
    keep = data.draw(st.integers(1, side * side))
    image = features(side * side)
    chosen = keep_tokens("pooling", image, keep, seed=0)
    indices, used = chosen.indices, chosen.tokens
    if keep == side * side:
        return
    cells = round(len(indices) ** 0.5)
    assert cells * cells == len(indices)
    size = next(c for c in range(1, side + 1) if -(-side // c) == cells and (-(-side // c)) ** 2 <= keep)
    square = image.tokens[0].view(side, side, -1)
    for number, index in enumerate(indices.tolist()):
        top, left = number // cells * size, number % cells * size
        cell = square[top : top + size, left : left + size]
        torch.testing.assert_close(used[index], cell.mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)
        assert top <= index // side < top + size, "a mean stands inside its own cell, where its position is right"
        assert left <= index % side < left + size


def test_divprune_is_the_greedy_max_min_distance():
    image = features(30)
    kept = set(keep_tokens("divprune", image, 7, seed=0).indices.tolist())
    tokens = image.tokens[0]
    distance = 1 - F.cosine_similarity(tokens[:, None], tokens[None], dim=-1)
    chosen = [int(distance.sum(0).argmax())]
    while len(chosen) < 7:
        rest = [i for i in range(30) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(distance[i, chosen].min())))
    assert kept == set(chosen)


# ---- FastV


@pytest.mark.parametrize("keep", [1, 5, 16])
def test_fastv_equals_transformers_with_a_mask(keep):
    config = tiny_config(layers=4)
    reference, model = random_model(config, seed=1), from_transformers(random_model(config, seed=1))
    reference.set_attn_implementation("eager")
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([1, *[IMAGE] * VISUAL, 5, 9, 30, 44, 60, 61])
    answer = 3  # the last rows: of the prompt, and of two tokens of an answer
    logits, kept = fastv(model, ids, model.vision(pixels).tokens[0], keep, answer)
    with torch.no_grad():
        maps = reference(input_ids=ids[None], pixel_values=pixels, output_attentions=True).attentions
    places = (ids == IMAGE).nonzero()[:, 0]
    attention = maps[FASTV_LAYER - 1][0, :, len(ids) - answer].mean(0)[places]
    assert set(kept) == set(attention.topk(keep).indices.tolist())

    dropped = [int(place) for i, place in enumerate(places) if i not in kept]

    def mask_dropped(module, args, kwargs):
        mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        mask[:, dropped] = -torch.inf
        mask.fill_diagonal_(0)  # nobody reads the dropped rows' own outputs
        return args, kwargs | {"attention_mask": mask[None, None]}

    for layer in reference.model.language_model.layers[FASTV_LAYER:]:
        layer.register_forward_pre_hook(mask_dropped, with_kwargs=True)
    with torch.no_grad():
        expected = reference(input_ids=ids[None], pixel_values=pixels).logits[0, -answer:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_fastv_saves_in_the_late_layers_alone():
    config = tiny_config(layers=4)
    model = from_transformers(random_model(config))
    assert fastv_ratio(model, 30, VISUAL) == pytest.approx(1)
    few = flops_ratio(config, Route(VISUAL, (0, 1), (True,) * 4), 30)
    assert few < fastv_ratio(model, 30, 2) < 1
