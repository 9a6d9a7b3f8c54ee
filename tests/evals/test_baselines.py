"""FastV against transformers: the tokens that it keeps, and what the model says when the others are masked."""

from __future__ import annotations

import pytest
import torch

from evals.baselines import FASTV_LAYER, fastv, fastv_ratio
from models.flops import flops_ratio
from models.llava import from_transformers
from models.random_llava import random_model, tiny_config
from models.route import Route

IMAGE, VISUAL = 127, 16


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
