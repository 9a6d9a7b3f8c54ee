"""Heads and neurons of a vision transformer go as those of the language model do, and before them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from checkpoints.world import draw
from evals import inspect
from models.checkpoint import load, open_transformers
from models.layer_shapes import LayerShape, layer_shapes
from models.llava import from_transformers
from models.manifest import read_manifest
from models.random_llava import random_model
from pruning import samples
from pruning.samples import Sample
from pruning.static import held_out, obs, pipeline, plan, structured
from pruning.static.blocks import blocks, sequential
from pruning.static.packing import PackedSample, pack
from pruning.static.recipe import RecipeError, read
from tests.checkpoints.smol.test_shape import tiny_config as convolutional
from tests.models.hub import hub_config, write_hub
from tests.pruning.kills import Killed, die_at
from tests.pruning.static.test_structured import least_squares
from tests.server.tiny import VISUAL, answer, new_engine, processor

FAMILIES = ["llava", "llava_next", "llava_onevision"]
"""CLIP, CLIP on tiles, SigLIP on tiles."""


def drawn(preprocessor: Any, count: int = 4) -> list[PackedSample]:
    return [pack(preprocessor, Sample(draw("train", i).image.resize((90, 40)), [("What is it?", "red")])) for i in range(count)]


def features(model: Any, sample: PackedSample) -> Tensor:
    """What the language model sees of a picture: [visual tokens, width]."""
    with torch.no_grad():
        return torch.cat(list(model.model.get_image_features(**sample.image(model)).pooler_output))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "obs"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_equals_zeroing(family, name, tmp_path):
    """Here and in transformers; what is read no more is at zero in the reference, which has all its heads and neurons."""
    directory = write_hub(tmp_path / "dense", hub_config(family))
    cut, zeroed = (open_transformers(directory, dtype="float32") for _ in range(2))
    found = drawn(cut.preprocessor)
    for (block, inputs), (other, _) in zip(
        sequential(cut.model, found, "vision"), sequential(zeroed.model, found, "vision"), strict=True
    ):
        removals = structured.removals(block, inputs, name)
        other.linear("self_attn.out_proj").load_state_dict(removals.heads.parameters(1))
        other.linear("mlp.fc2").load_state_dict(removals.neurons.parameters(24))
        removals.apply(LayerShape(1, 24))
        assert block.linear("self_attn.k_proj").weight.shape == (16, 32)
        assert block.linear("mlp.fc1").bias.shape == (24,)
    dense = open_transformers(directory, dtype="float32").model
    changed = structured.update_config(cut.model)["vision_config"]["layer_shapes"]
    assert changed == [{"kv_heads": 1, "ffn": 24}] * 2 + [{"kv_heads": 2, "ffn": 64}], "the last layer never runs"
    ours = from_transformers(cut.model.requires_grad_(False))
    for sample in found:
        expected = features(zeroed.model, sample)
        assert not torch.allclose(expected, features(dense, sample), rtol=1e-2, atol=1e-2)
        seen = ours.encode(sample.picture.pixels, sample.picture.layout).tokens[0]
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
        assert ours.encode(sample.picture.pixels, sample.picture.layout, 0.5).tokens.isfinite().all()


def test_compensation_brings_the_features_closer_to_dense(tmp_path):
    errors, source = {}, open_transformers(write_hub(tmp_path / "dense", hub_config("llava")), dtype="float32")
    found = drawn(source.preprocessor, 8)
    wanted = [features(source.model, sample) for sample in found]
    for name in ("magnitude", "wanda", "obs"):
        model = open_transformers(source.directory, dtype="float32").model
        for block, inputs in sequential(model, found, "vision"):
            structured.removals(block, inputs, name).apply(LayerShape(2, 32))
        errors[name] = sum(float((features(model, s) - dense).square().sum()) for s, dense in zip(found, wanted, strict=True))
    assert errors["obs"] < 0.5 * min(errors["wanda"], errors["magnitude"])


def test_a_bias_is_the_weight_of_an_input_that_is_always_one(tmp_path):
    """What is kept, bias included, is the damped least squares on what the matrix is given."""
    source = open_transformers(write_hub(tmp_path / "dense", hub_config("llava")), dtype="float32")
    block, inputs = next(sequential(source.model, drawn(source.preprocessor), "vision"))
    neurons = structured.removals(block, inputs, "obs").neurons
    fc2, given = block.layer.mlp.fc2, []
    handle = fc2.register_forward_pre_hook(lambda module, rows: given.append(rows[0].flatten(0, -2)))
    for one in inputs:
        one.run(block)
    handle.remove()
    rows = F.pad(torch.cat(given), (0, 1), value=1.0).detach().double()
    metric = 2 * rows.T @ rows / len(rows)
    metric += obs.DAMPING * metric.diagonal().mean() * torch.eye(len(metric))
    best, _ = least_squares(structured.weight_and_bias(fc2), metric, neurons.order[:24])
    found = neurons.parameters(40)
    torch.testing.assert_close(found["weight"], best[:, :-1].float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["bias"], best[:, -1].float(), rtol=1e-3, atol=1e-4)
    assert (found["bias"] - fc2.bias).abs().max() > 0.01


# ---- checkpoints


@pytest.fixture(scope="module", autouse=True)
def few_held_out() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "PICTURES", 2)
        yield


def prune(dense: Path, out: Path, **given: Any) -> Any:
    return pipeline.run(read(None, {"pattern": "structured", "samples": 4, **given}), dense, out, quiet=True)


BOTH = {"tower": 0.4, "sparsity": 0.3}


@pytest.fixture(scope="module", name="both")
def both_pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("both") / "out"
    prune(dense, out, **BOTH)
    return out


@pytest.fixture(scope="module", name="alone")
def tower_pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "out"
    prune(dense, out, tower=0.4, sparsity=0)
    return out


def test_tower_and_language_model_lose_their_shares(dense, both, capsys):
    whole, pruned = (load(path, dtype="float32") for path in (dense, both))
    for module, share in (("vision", 0.4), ("language", 0.3)):
        before, after = (
            sum(linear.size for name, linear in one.model.linears().items() if name.startswith(module)) for one in (whole, pruned)
        )
        assert after == pytest.approx((1 - share) * before, rel=0.1)  # units of a matrix this small are large
    pruning = pruned.manifest.pruning
    assert next(iter(pruning.sparsity)) == "vision.0.self_attn.q_proj"
    shapes = [LayerShape(**pruning.notes["layer_shapes"][f"vision.{i}"]) for i in range(2)]
    assert shapes == layer_shapes(pruned.model.config.vision_config)
    assert answer(new_engine(pruned), 0).finished.receipt.visual_tokens == VISUAL
    inspect.run(both)
    shown = capsys.readouterr().out
    assert "tower 0.4" in shown and "vision.1" in shown and "fc2" in shown


def test_the_tower_alone_leaves_the_language_model_as_it_was(dense, alone):
    before, after = (load_file(path / "model.safetensors") for path in (dense, alone))
    changed = {name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])}
    assert changed and all("vision_tower" in name for name in changed)
    assert all(name.startswith("vision.") for name in read_manifest(alone).pruning.sparsity)


def test_the_language_model_is_pruned_on_what_the_tower_shows(alone, both):
    tower, found = open_transformers(alone), open_transformers(both)
    packed = [pack(tower.preprocessor, sample) for sample in samples.read(samples.WORLD, 4, 0)]
    block, inputs = next(sequential(tower.model, packed))
    removals = structured.removals(block, inputs, "obs")
    removals.apply(removals.cheapest(round((1 - BOTH["sparsity"]) * structured.weight_count(block))))
    for name, linear in blocks(found.model)[0].linears().items():
        torch.testing.assert_close(linear.weight, block.linears()[name].weight, rtol=1e-4, atol=1e-4)


def test_a_run_killed_in_the_tower_goes_on_there(dense, both, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, structured.BlockRemovals, "apply", 2)
        with pytest.raises(Killed):
            prune(dense, tmp_path / "out", **BOTH)
    again = die_at(monkeypatch, structured.BlockRemovals, "apply", -1)
    assert prune(dense, tmp_path / "out", **BOTH).files == read_manifest(both).files
    assert again == [4]  # of two layers and three


def test_the_plan_counts_the_tower(dense, tmp_path):
    weights = plan.matrix_weights(dense)
    recipe = read(None, {"pattern": "structured", "tower": 0.25, "sparsity": 0.5})
    blocks_size = (0.75 * weights["vision"] + 0.5 * weights["language"]) * 4
    assert plan.disk(recipe, dense, "float32").blocks == pytest.approx(blocks_size, rel=1e-6)
    source = open_transformers(dense)
    assert weights["vision"] == sum(structured.weight_count(block) for block in blocks(source.model, "vision"))
    found = [pack(source.preprocessor, sample) for sample in samples.read(samples.WORLD, 4, 0)]
    one, both = (
        plan.memory(read(None, {"pattern": "structured", "tower": share}), source.model, found, dense) for share in (0, 0.25)
    )
    assert one.most <= both.most
    assert set(plan.seconds(recipe, source.model, found, plan.disk(recipe, dense, "float32"))) == {"tower", "blocks"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tower": 1.0}, "tower: Input should be less than 1"),
        ({"tower": 0.2, "pattern": "unstructured"}, "tower needs pattern structured"),
        ({"tower": 0.2, "pattern": "2:4"}, "tower needs pattern structured"),
        ({"sparsity": 0.0}, "sparsity 0 prunes nothing, unless tower is above 0"),
    ],
)
def test_a_share_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(RecipeError, match=message):
        read(None, {"pattern": "structured", **given})


def test_a_convolutional_tower_is_refused_before_the_work(tmp_path):
    random_model(convolutional(), seed=1).save_pretrained(tmp_path / "dense")
    processor().save_pretrained(tmp_path / "dense")
    with pytest.raises(RecipeError, match=r"tower: .*dense has no vision transformer, whose heads and neurons could go; leave"):
        prune(tmp_path / "dense", tmp_path / "out", tower=0.2, data="world")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
