"""Our forward and transformers on one copy of the weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.runners import (
    EspalierRunner,
    TransformersRunner,
    prune_randomly,
    random_prompts,
    share_weights,
    transformers_only_bytes,
)
from models.forward import forward, prefill_input
from models.random_llava import random_model, tiny_config
from models.route import Route
from models.weight_format import is_2_4


@pytest.mark.parametrize(("kind", "options"), [("llama", {}), ("llama", {"bias": True}), ("qwen2", {})])
def test_both_runners_agree_on_shared_weights(kind, options):
    config = tiny_config(kind, **options)
    untouched, reference = random_model(config, seed=1), random_model(config, seed=1)
    model = share_weights(reference)
    prompts = random_prompts(model, 2)
    ids, route = prompts.ids[0], Route.full(16, 3)
    cache = model.new_cache(route.rows(len(ids)))
    logits = forward(model, [prefill_input(model, ids, model.vision(prompts.pixels).tokens[0], route, cache)])[0]
    with torch.no_grad():
        expected, theirs = (
            one(input_ids=ids[None], pixel_values=prompts.pixels[:1]).logits[0, -1]
            for one in (untouched, reference)
        )
    torch.testing.assert_close(theirs, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    theirs = TransformersRunner(reference).run(prompts, 8).output_ids
    assert EspalierRunner(model, route).run(prompts, 8).output_ids[:1] == theirs


def test_shared_weights_are_held_once():
    reference = random_model(tiny_config(bias=True), seed=1)
    before = sum(parameter.nbytes for parameter in reference.parameters())
    model = share_weights(reference)
    assert sum(parameter.nbytes for parameter in reference.parameters()) == before
    fused = {matrix.weight.untyped_storage().data_ptr() for matrix in model.linears().values()}
    unused = reference.model.vision_tower.encoder.layers[len(model.vision.tower.layers) :]
    own = {id(parameter) for parameter in unused.parameters()}
    matrices = [module.weight for module in reference.modules() if isinstance(module, torch.nn.Linear)]
    assert all(weight.untyped_storage().data_ptr() in fused for weight in matrices if id(weight) not in own)
    assert len(unused) == 1
    assert transformers_only_bytes(reference, model) == sum(parameter.nbytes for parameter in unused.parameters())


def test_no_runner_stops_early_and_an_image_token_is_a_token():
    reference = random_model(tiny_config(), seed=1)
    model = share_weights(reference)
    prompts = random_prompts(model, 1)
    second = TransformersRunner(reference).run(prompts, 2).output_ids[0][1]
    reference.generation_config.eos_token_id = second
    with torch.no_grad():
        model.head.weight[127] = 3 * model.head.weight[second]
    ours = EspalierRunner(model, Route.full(16, 3)).run(prompts, 6).output_ids
    assert ours == TransformersRunner(reference).run(prompts, 6).output_ids
    assert len(ours[0]) == 6
    assert 127 in ours[0]


def test_random_pruning_repeats_and_leaves_the_dense_model_alone():
    model = share_weights(random_model(tiny_config(), dtype=torch.float32))
    before = model.decoder_layers[0].qkv.weight.clone()
    one, two = prune_randomly(model, 0.5, "2:4"), prune_randomly(model, 0.5, "2:4")
    assert torch.equal(one.decoder_layers[2].down.weight, two.decoder_layers[2].down.weight)
    assert all(is_2_4(matrix.weight) and matrix.nonzeros == matrix.size // 2 for matrix in one.decoder_layers[1].linears().values())
    assert torch.equal(model.decoder_layers[0].qkv.weight, before)
    assert one.head is model.head
