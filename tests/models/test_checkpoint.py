"""The checkpoint format: what transformers saved comes back whole, and what is broken is named."""

from __future__ import annotations

import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from models.checkpoint import load
from models.errors import CheckpointError
from models.forward import forward, prefill_input
from models.llava import UnsupportedCheckpoint
from models.route import Route
from tests.models.saved import copy_to_break, edit, edit_tensors, fails, put, saved_checkpoint  # noqa: F401
from tests.server.tiny import LAYERS, VISUAL, processor, write


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write(tmp_path_factory.mktemp("saved") / "sharded", max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.mark.parametrize("layout", ["saved", "sharded"])
def test_what_transformers_saved_answers_as_transformers_does(layout, request):
    directory = request.getfixturevalue(layout)
    checkpoint = load(directory, dtype="float32")
    reference = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ids = checkpoint.preprocessor.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}])
    model, route = checkpoint.model, Route.full(VISUAL, LAYERS)
    cache = model.new_cache(route.rows(len(ids)))
    prompt = prefill_input(model, torch.tensor(ids), model.vision(pixels).tokens[0], route, cache)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
    torch.testing.assert_close(forward(model, [prompt])[0], expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_knows_its_name_its_end_and_its_manifest(saved):
    checkpoint = load(saved)
    assert checkpoint.name == "one-file"
    assert checkpoint.eos == {processor().tokenizer.eos_token_id}
    assert checkpoint.manifest.calibration.layer_change == [0.5, 0.1, 1.0]
    assert checkpoint.preprocessor.untiled.visual_tokens == VISUAL


def test_several_end_tokens_are_all_ends(broken):
    edit(broken / "generation_config.json", lambda config: config.update(eos_token_id=[2, 5]))
    assert load(broken).eos == {2, 5}


@pytest.mark.parametrize(
    ("asked", "got"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)],
)
def test_dtype_is_the_saved_one_unless_asked_otherwise(saved, asked, got):
    model = load(saved, dtype=asked).model
    assert model.dtype == got
    assert {matrix.weight.dtype for matrix in model.linears().values()} == {got}


def test_an_unknown_dtype_is_refused(saved):
    with pytest.raises(CheckpointError, match=r"float8.*float32, bfloat16, float16"):
        load(saved, dtype="float8")


def test_the_fingerprint_tells_weights_apart(saved, broken):
    same, before = load(saved).fingerprint, load(broken).fingerprint
    assert same == before
    edit_tensors(broken, lambda tensors: next(iter(tensors.values())).add_(1))
    assert load(broken).fingerprint != before


def test_tensors_that_nobody_needs_are_left_alone(broken):
    edit_tensors(broken, lambda tensors: tensors.update({"something.else": torch.ones(2)}))
    assert load(broken).model.num_layers == LAYERS




@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "processor_config.json"]
)
def test_a_missing_file_is_named(broken, name):
    (broken / name).unlink()
    fails(broken, str(broken), "preprocessor_config.json" if name == "processor_config.json" else name, "missing")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "espalier.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_file_is_an_error_of_ours(broken, name, content):
    (broken / name).write_text(content)
    fails(broken, str(broken))


def test_a_missing_shard_is_named(sharded, tmp_path):
    directory = Path(shutil.copytree(sharded, tmp_path / "sharded"))
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    fails(directory, shard.name, "missing")


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(sharded, tmp_path, content):
    directory = Path(shutil.copytree(sharded, tmp_path / "sharded"))
    (directory / "model.safetensors.index.json").write_text(content)
    fails(directory, "model.safetensors.index.json")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_shard_is_named(broken, share):
    shard = broken / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * share)])
    fails(broken, "model.safetensors", "truncated")


def test_a_file_that_is_something_else_is_named(broken):
    (broken / "model.safetensors").write_bytes(b"<html>Not found</html>" * 100)
    fails(broken, "model.safetensors", "not safetensors")


def test_pickles_are_never_loaded(broken):
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (broken / "exploded",)

    tensors = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save({**tensors, "bomb": Bomb()}, broken / "pytorch_model.bin")
    fails(broken, "pytorch_model.bin is a pickle")
    assert not (broken / "exploded").exists()


def test_a_missing_tensor_is_named(broken):
    name = "language_model.layers.1.mlp.down_proj.weight"

    def remove(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(key for key in tensors if "layers.1.mlp.down_proj" in key)]

    edit_tensors(broken, remove)
    fails(broken, "1 tensors", name)


def test_a_tensor_of_another_shape_is_named(broken):
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        key = next(key for key in tensors if "layers.1.mlp.down_proj" in key)
        tensors[key] = tensors[key][:, 1:].contiguous()

    edit_tensors(broken, narrow)
    fails(broken, "another shape", "layers.1.mlp.down_proj.weight")


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("text_config", "num_hidden_layers", 100_000, "100000 layers"),
        ("vision_config", "num_hidden_layers", 10**12, "1000000000000 layers"),
        ("text_config", "num_hidden_layers", 0, "0 layers"),
        ("text_config", "vocab_size", 2**40, "embed_tokens.weight"),
        ("text_config", "hidden_size", 2**20, "1048576"),
        ("text_config", "hidden_size", 2**62, "config.json"),
        ("text_config", "intermediate_size", 2**40, "mlp.gate_proj.weight"),
        ("vision_config", "image_size", 10**6, "position_embedding"),
    ],
)
def test_sizes_that_do_not_fit_the_files_are_refused_at_once(broken, section, key, value, words):
    edit(broken / "config.json", put(section, key, value=value))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    fails(broken, str(broken), words)
    assert time.process_time() - started < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (put("architectures", value=["LlamaForCausalLM"]), CheckpointError, "LlamaForCausalLM"),
        (put("architectures", value=None), CheckpointError, "architecture none"),
        (put("vision_config", "model_type", value="siglip2_vision_model"), UnsupportedCheckpoint, "siglip2_vision_model"),
        (put("vision_config", "model_type", value="nonesuch"), CheckpointError, "nonesuch"),
        (put("text_config", "model_type", value="gemma"), UnsupportedCheckpoint, "gemma"),
        (put("text_config", "model_type", value="nonesuch"), CheckpointError, "nonesuch"),
        (put("text_config", "hidden_act", value="gelu"), UnsupportedCheckpoint, "gelu"),
        (put("vision_feature_layer", value=-9), UnsupportedCheckpoint, "-9"),
        (put("vision_feature_select_strategy", value="cls_only"), CheckpointError, "cls_only"),
        (
            put("text_config", "rope_parameters", value={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            UnsupportedCheckpoint, "dynamic",
        ),
    ],
)  # fmt: skip
def test_what_the_forward_cannot_run_is_named(broken, change, error, words):
    edit(broken / "config.json", change)
    fails(broken, words, error=error)
