"""Whole heads and neurons go: what is lost is what least squares says, and what is left runs here and in transformers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from models.checkpoint import load
from models.families import Layout
from models.forward import decode_input, forward, prefill_input
from models.layer_shapes import LayerShape, coupled_units, layer_shapes, shape_of, slice_to_shape, unit_indices
from models.llava import Llava, from_transformers
from models.preprocess import Picture
from models.random_llava import random_model, tiny_config
from models.route import Route
from pruning.static import obs, structured, wanda
from pruning.static.blocks import blocks, sequential
from pruning.static.packing import PackedSample
from tests.server.tiny import processor, write

IMAGE, VISUAL = 127, 16
KINDS = [("llama", {"kv_heads": 4}), ("llama", {"kv_heads": 2, "bias": True}), ("mistral", {}), ("qwen2", {})]


def problem(units: int, size: int = 1, out: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, units * size] and an ill-scaled H for it."""
    generator = torch.Generator().manual_seed(seed)
    width = units * size
    rows = torch.randn(4 * width, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return torch.randn(out, width, generator=generator, dtype=torch.float64), 2 * rows.T @ rows / len(rows)


def least_squares(weight: Tensor, metric: Tensor, gone: Tensor) -> tuple[Tensor, float]:
    """The best weight with columns `gone` at zero and its loss, from the normal equations of what is kept."""
    kept = torch.tensor([i for i in range(weight.shape[1]) if i not in gone.tolist()])
    best = torch.zeros_like(weight)
    best[:, kept] = torch.linalg.solve(metric[kept][:, kept], metric[kept] @ weight.T).T
    change = weight - best
    return best, float((change @ metric @ change.T).trace() / 2)


# ---- matrices


@pytest.mark.parametrize(("units", "size"), [(7, 1), (5, 3)])
def test_removing_any_units_is_made_up_for_as_by_least_squares(units, size):
    weight, metric = problem(units, size)
    for count in range(1, units):
        for chosen in itertools.combinations(range(units), count):
            gone = unit_indices(torch.tensor(chosen), size)
            best, _ = least_squares(weight, metric, gone)
            torch.testing.assert_close(structured.compensate(weight, metric.inverse(), gone), best)


@pytest.mark.parametrize(("units", "size"), [(9, 1), (4, 4), (200, 1)])  # of 200, three go in the first round
def test_losses_are_those_of_least_squares_and_optimal(units, size):
    weight, metric = problem(units, size)
    order, losses = structured.removal_order(weight, metric.inverse(), size)
    assert sorted(order.tolist()) == list(range(units))
    assert len(losses) == units
    assert losses[0] == 0
    assert (losses.diff() > 0).all()
    for count in range(1, units, max(1, units // 8)):
        best, loss = least_squares(weight, metric, unit_indices(order[:count], size))
        assert float(losses[count]) == pytest.approx(loss, rel=1e-6)
        gradient = ((best - weight) @ metric).index_fill(1, unit_indices(order[:count], size), 0)
        assert gradient.abs().max() < 1e-6 * (weight @ metric).abs().max()  # flat in every direction that is left


@pytest.mark.parametrize("size", [1, 3])
def test_what_goes_first_costs_least_of_all(size):
    weight, metric = problem(6, size)
    order, losses = structured.removal_order(weight, metric.inverse(), size)
    single = [least_squares(weight, metric, unit_indices(torch.tensor([unit]), size))[1] for unit in range(6)]
    assert single.index(min(single)) == order[0]
    assert float(losses[1]) == pytest.approx(min(single))


def test_without_correlation_the_order_is_by_weight_times_norm():
    weight, _ = problem(12)
    norms = torch.rand(12, dtype=torch.float64) + 0.1
    inverse, dead = structured.inverse_metric(norms, weight)
    order, losses = structured.removal_order(weight, inverse, 1)
    scores = (weight * norms).square().sum(0)
    assert order.tolist() == scores.argsort().tolist()
    torch.testing.assert_close(losses[1:], scores.sort().values[:11].cumsum(0))
    assert not dead.any()
    kept = structured.compensate(weight, inverse, order[:5])
    torch.testing.assert_close(kept[:, order[5:]], weight[:, order[5:]], rtol=0, atol=0)


def test_two_copies_of_a_neuron_are_one():
    """What OBS sees and the others do not: a neuron that another one can stand in for costs nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 6, generator=generator)
    rows[:, 4] = 2 * rows[:, 1]
    weight = torch.randn(5, 6, generator=generator).double() + 1
    statistics = obs.empty(6)
    obs.accumulate(statistics, rows)
    inverse, _ = structured.inverse_metric(obs.prepare(statistics, 1e-6), weight)
    order, losses = structured.removal_order(weight, inverse, 1)
    assert order[0] in (1, 4)
    assert losses[1] < 1e-3 * losses[2]
    after = structured.compensate(weight, inverse, order[:1])
    torch.testing.assert_close(rows.double() @ after.T, rows.double() @ weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("module", [obs, wanda])
def test_dead_inputs_are_known(module):
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    rows[:, [2, 5]] = 0
    statistics = module.empty(8)
    module.accumulate(statistics, rows)
    _, dead = structured.inverse_metric(module.prepare(statistics), torch.ones(3, 8).double())
    assert dead.nonzero()[:, 0].tolist() == [2, 5]


# ---- blocks


def asked(ids: torch.Tensor, pixels: torch.Tensor) -> PackedSample:
    """One question, whose answer is the last two tokens."""
    answers = torch.arange(len(ids)) >= len(ids) - 2
    picture = Picture(pixels, Layout(VISUAL))
    return PackedSample(ids, picture, (32, 32), answers, torch.zeros(len(ids), dtype=torch.long), torch.arange(len(ids)))


def samples(count: int = 6) -> list[PackedSample]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        words = torch.randint(3, 120, (9,), generator=generator)
        ids = torch.cat([torch.tensor([1, *[IMAGE] * VISUAL]), words])
        found.append(asked(ids, torch.randn(1, 3, 32, 32, generator=generator)))
    return found


def prune(model: LlavaForConditionalGeneration, name: str, wanted: Any) -> list[LayerShape]:
    """Every block, to a share of its weights or to a shape."""
    shapes = []
    for block, inputs in sequential(model, samples()):
        removals = structured.removals(block, inputs, name)
        shape = wanted if isinstance(wanted, LayerShape) else removals.cheapest(round(wanted * structured.weight_count(block)))
        removals.apply(shape)
        shapes.append(shape)
    return shapes


def outputs(model: LlavaForConditionalGeneration) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(**sample.inputs(model)).logits[0] for sample in samples(2)])


@pytest.mark.parametrize("name", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize("share", [0.75, 0.5])
def test_a_block_keeps_what_was_asked_to_the_nearest_neurons(name, share):
    model = random_model(tiny_config(), seed=1)
    dense = [structured.weight_count(block) for block in blocks(model)]
    for shape, before, block in zip(prune(model, name, share), dense, blocks(model), strict=True):
        neuron = coupled_units(block.layer)[1].weights_per_unit
        assert abs(structured.weight_count(block) - share * before) <= structured.ALIGN / 2 * neuron
        assert shape == shape_of(block.layer)
        assert shape.ffn % structured.ALIGN == 0
    assert outputs(model).isfinite().all()


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("name", ["magnitude", "wanda", "obs"])
def test_cutting_equals_zeroing(kind, options, name):
    """Columns that are read no more are at zero in the dense block; cut out, they leave the output as it is. Groups go whole."""
    cut, zeroed = (random_model(tiny_config(kind, **options), seed=1) for _ in range(2))
    for (block, inputs), (other, _) in zip(sequential(cut, samples()), sequential(zeroed, samples()), strict=True):
        removals = structured.removals(block, inputs, name)
        with torch.no_grad():
            other.linear("self_attn.o_proj").load_state_dict(removals.heads.parameters(1))
            other.linear("mlp.down_proj").load_state_dict(removals.neurons.parameters(40))
        removals.apply(LayerShape(1, 40))
        heads = tiny_config(kind, **options).text_config.num_attention_heads // coupled_units(other.layer)[0].units
        assert block.linear("self_attn.q_proj").weight.shape[0] == 12 * heads
        assert block.linear("self_attn.v_proj").weight.shape[0] == 12
    torch.testing.assert_close(outputs(cut), outputs(zeroed), rtol=1e-4, atol=1e-4)


def test_compensation_brings_the_block_closer_to_dense():
    model = random_model(tiny_config(), seed=1)
    block, inputs = next(sequential(model, samples()))
    with torch.no_grad():
        dense = [one.run(block) for one in inputs]
    errors = {}
    for name in ("wanda", "obs"):
        other = random_model(tiny_config(), seed=1)
        block, inputs = next(sequential(other, samples()))
        structured.removals(block, inputs, name).apply(LayerShape(1, 48))
        with torch.no_grad():
            errors[name] = sum(float((one.run(block) - out).square().mean()) for one, out in zip(inputs, dense, strict=True))
    assert errors["obs"] < 0.8 * errors["wanda"]


@pytest.mark.parametrize("name", ["wanda", "obs"])
def test_dead_neurons_go_first_and_cost_nothing(name):
    model = random_model(tiny_config(), seed=1)
    dead = list(range(0, 96, 2))
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        layer.mlp.up_proj.weight[dead] = 0
    before = outputs(model)
    block, inputs = next(sequential(model, samples()))
    removals = structured.removals(block, inputs, name)
    assert sorted(removals.neurons.order[:48].tolist()) == dead
    assert removals.neurons.loss(48) == 0 < removals.neurons.loss(47)
    removals.apply(LayerShape(2, 48))
    torch.testing.assert_close(outputs(model), before)


def test_what_costs_least_goes():
    """With heads that say nothing, the heads go; with neurons that say little, all heads stay."""
    for silent, (low, high) in (("self_attn.o_proj", (1, 2)), ("mlp.down_proj", (4, 4))):
        model = random_model(tiny_config(kv_heads=4), seed=1)
        block, inputs = next(sequential(model, samples()))
        with torch.no_grad():
            block.linear(silent).weight.mul_(1e-3)
        found = structured.removals(block, inputs, "obs").cheapest(round(0.7 * structured.weight_count(block)))
        assert low <= found.kv_heads <= high


def test_the_last_head_and_the_last_neurons_stay():
    model = random_model(tiny_config(), seed=1)
    block, inputs = next(sequential(model, samples()))
    removals = structured.removals(block, inputs, "obs")
    heads, neurons = (coupled.weights_per_unit for coupled in coupled_units(block.layer))
    assert removals.cheapest(heads + 8 * neurons) == LayerShape(1, 8)
    with pytest.raises(ValueError, match="no shape leaves a block 100 weights"):
        removals.cheapest(100)
    assert removals.cheapest(structured.weight_count(block)) == LayerShape(2, 96)
    removals.apply(LayerShape(1, 1))
    assert outputs(model).isfinite().all()


def test_what_cannot_be_used_is_named():
    model = random_model(tiny_config(), seed=1)
    block, inputs = next(sequential(model, samples()))
    with torch.no_grad():
        block.linear("mlp.down_proj").weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"language\.0\.mlp\.down_proj: the weights are not finite"):
        structured.removals(block, inputs, "obs")
    with torch.no_grad():
        block.linear("self_attn.v_proj").weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"language\.0\.self_attn\.o_proj: .*not finite"):
        structured.removals(block, inputs, "obs")


def test_a_pruned_block_comes_back_as_it_was_saved():
    config = tiny_config("qwen2")
    model, again = random_model(config, seed=1), random_model(config, seed=1)
    shapes = prune(model, "obs", 0.5)
    for shape, block, other in zip(shapes, blocks(model), blocks(again), strict=True):
        structured.restore(other, shape, structured.tensors(block))
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)


# ---- checkpoints


def answers(model: Llava, ids: list[int], pixels: Tensor, steps: int) -> list[Tensor]:
    """Logits of a prompt and of so many greedy tokens after it."""
    visual = model.vision(pixels).tokens[0]
    route = Route.full(len(visual), model.num_layers)
    cache = model.new_cache(route.rows(len(ids), steps))
    found = [forward(model, [prefill_input(model, torch.tensor(ids), visual, route, cache)])[0]]
    for step in range(steps):
        token = found[-1].argmax()[None]
        found.append(forward(model, [decode_input(model, token, len(ids) + step, route, cache)])[0])
    return found


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_layers_of_different_shapes_answer_as_sliced_modules(kind, options, tmp_path):
    model = random_model(tiny_config(kind, **options), seed=1)
    shapes = [LayerShape(1, 40), LayerShape(2, 24), LayerShape(1, 96)]
    for (block, inputs), shape in zip(sequential(model, samples()), shapes, strict=True):
        structured.removals(block, inputs, "obs").apply(shape)
    for layer in model.model.vision_tower.encoder.layers:
        slice_to_shape(layer, LayerShape(1, 24))
    assert set(structured.update_config(model)) == {"text_config", "vision_config"}
    assert layer_shapes(model.config.text_config) == shapes
    sample = samples(1)[0]
    with torch.no_grad():
        expected = model(**sample.inputs(model)).logits[0, -1]
    model.save_pretrained(tmp_path)
    ours = from_transformers(model)
    assert ours.kv_heads == [1, 2, 1]
    torch.testing.assert_close(answers(ours, sample.ids.tolist(), sample.picture.pixels, 0)[0], expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="mismatch"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path)


def pruned_checkpoint(directory: Path, shapes: list[LayerShape]) -> LlavaForConditionalGeneration:
    """A checkpoint on disk whose language model was pruned to these shapes; and the modules that were saved."""
    write(directory)
    model = LlavaForConditionalGeneration.from_pretrained(directory)
    tokenizer = processor().tokenizer
    found = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        words = torch.tensor(tokenizer(f"What color is star {seed}?").input_ids)
        ids = torch.cat([torch.full((144,), model.config.image_token_id), words])
        found.append(asked(ids, torch.randn(1, 3, 96, 96, generator=generator)))
    for (block, inputs), shape in zip(sequential(model, found), shapes, strict=True):
        structured.removals(block, inputs, "obs").apply(shape)
    structured.update_config(model)
    model.save_pretrained(directory)
    return model


def test_a_checkpoint_with_shapes_by_layer_loads_here(tmp_path):
    shapes = [LayerShape(2, 56), LayerShape(1, 96), LayerShape(1, 8)]
    reference = pruned_checkpoint(tmp_path / "sliced", shapes)
    checkpoint = load(tmp_path / "sliced")
    ids = checkpoint.preprocessor.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}])
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    made: list[int] = []
    for got in answers(checkpoint.model, ids, pixels, 6):
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([[*ids, *made]]), pixel_values=pixels).logits[0, -1]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        made.append(int(got.argmax()))
    assert layer_shapes(checkpoint.model.config.text_config) == shapes
    keys = load_file(tmp_path / "sliced" / "model.safetensors")
    assert keys["language_model.model.layers.1.self_attn.k_proj.weight"].shape == (12, 48)


def test_a_uniform_checkpoint_loads_here_and_there(tmp_path):
    reference = pruned_checkpoint(tmp_path / "uniform", [LayerShape(1, 48)] * 3)
    assert "layer_shapes" not in (tmp_path / "uniform" / "config.json").read_text()
    checkpoint = load(tmp_path / "uniform")
    assert checkpoint.model.kv_heads == [1, 1, 1]
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "uniform")
    ids = checkpoint.preprocessor.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}])
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    asked = {"input_ids": torch.tensor([ids]), "pixel_values": pixels}
    with torch.no_grad():
        torch.testing.assert_close(stock(**asked).logits, reference(**asked).logits)
    made = stock.generate(**asked, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert [int(logits.argmax()) for logits in answers(checkpoint.model, ids, pixels, 7)] == made.tolist()
