"""The checkpoint format: what transformers saved comes back whole, and what is broken is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from checkpoints.embedded import SHIPPED
from models.checkpoint import load, resolve, sha256
from models.forward import forward, prefill_input
from models.llava import UnsupportedCheckpoint
from models.manifest import Calibration, CheckpointError, Manifest, read_manifest, write_manifest
from models.route import Route
from tests.server.tiny import LAYERS, VISUAL, processor, write


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("saved") / "one-file")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write(tmp_path_factory.mktemp("saved") / "sharded", max_shard_size="100KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def fails(directory: Path, *words: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        load(directory)
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


# ---- what is whole


@pytest.mark.parametrize("layout", ["saved", "sharded"])
def test_what_transformers_saved_answers_as_transformers_does(layout, request):
    directory = request.getfixturevalue(layout)
    checkpoint = load(directory, dtype="float32")
    reference = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ids = checkpoint.preprocessor.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}])
    model, route = checkpoint.model, Route.full(VISUAL, LAYERS)
    cache = model.new_cache(route.rows(len(ids)))
    work = prefill_input(model, torch.tensor(ids), model.vision(pixels).tokens[0], route, cache)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
    torch.testing.assert_close(forward(model, [work])[0], expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_knows_its_name_its_end_and_its_manifest(saved):
    checkpoint = load(saved)
    assert checkpoint.name == "one-file"
    assert checkpoint.eos == {processor().tokenizer.eos_token_id}
    assert checkpoint.manifest.calibration.layer_change == [0.5, 0.1, 1.0]
    assert checkpoint.preprocessor.visual_tokens_per_image == VISUAL


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


def test_resolve_knows_the_embedded_checkpoint(tmp_path):
    assert {name: resolve(name) for name in SHIPPED} == SHIPPED
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(CheckpointError, match=r"nowhere is not a directory.*embedded"):
        resolve(tmp_path / "nowhere")


def test_tensors_that_nobody_needs_are_left_alone(broken):
    edit_tensors(broken, lambda tensors: tensors.update({"something.else": torch.ones(2)}))
    assert load(broken).model.num_layers == LAYERS


# ---- what is not


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


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (put("architectures", value=["LlamaForCausalLM"]), CheckpointError, "LlamaForCausalLM"),
        (put("architectures", value=None), CheckpointError, "architecture none"),
        (put("vision_config", "model_type", value="siglip_vision_model"), UnsupportedCheckpoint, "siglip_vision_model"),
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


# ---- the manifest


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    manifest = Manifest(
        base_model="somebody/llava", calibration=Calibration(layer_change=[0.1, 1.0], data="pictures", samples=3, seed=1),
        cards={"strong": {"accuracy": 0.9, "interval": [0.8, 0.95]}}, files={"model.safetensors": "ab"},
    )  # fmt: skip
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["espalier.json"]


def test_a_checkpoint_without_a_manifest_loads(broken):
    (broken / "espalier.json").unlink()
    assert load(broken).manifest == Manifest()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (put("cheese", value=1), "cheese"),
        (put("version", value=3), "version"),
        (put("version", value="two"), "version"),
        (put("name", value=["two"]), "name"),
        (put("base_model", value=7), "base_model"),
        (put("calibration", "samples", value="many"), "calibration.samples"),
        (put("calibration", "layer_change", value=[0.1, "x", 1.0]), "calibration.layer_change.1"),
        (put("calibration", "mood", value="good"), "calibration.mood"),
        (put("calibration", "layer_change", value=[0.1]), "calibration.layer_change"),
        (put("cards", value={"strong": 3}), "cards.strong"),
        (put("router", value=[]), "router"),
        (put("files", value=["model.safetensors"]), "files"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_named_by_its_key(broken, change, key):
    edit(broken / "espalier.json", change)
    fails(broken, f"espalier.json: {key}")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({}, "remove it and run `espalier calibrate`"),
        ({"pruning": {}}, "make the checkpoint anew with `espalier prune`"),
        ({"pruning": {}, "router": {}}, "anew with `espalier prune`, then `espalier route`"),
    ],
)
def test_an_older_manifest_names_the_command_that_makes_it_anew(broken, sections, words):
    (broken / "espalier.json").write_text(json.dumps({"version": 1} | sections))
    fails(broken, "espalier.json: version 1 is older than 2", words)


def test_a_checkpoint_is_called_as_its_manifest_says(broken):
    edit(broken / "espalier.json", put("name", value="my-llava"))
    assert load(broken).name == "my-llava"


def test_a_name_and_cards_hold_for_one_checkpoint_alone():
    manifest = Manifest(name="mine", base_model="llava", cards={"off": {}}, router={"shape": {}})
    assert manifest.derive(files={"a": "b"}) == Manifest(base_model="llava", files={"a": "b"})


def test_files_are_checked_against_the_manifest(broken):
    weights = broken / "model.safetensors"
    edit(broken / "espalier.json", put("files", value={weights.name: sha256(weights)}))
    assert load(broken).manifest.files
    edit_tensors(broken, lambda tensors: next(iter(tensors.values())).add_(1))
    fails(broken, "model.safetensors", "espalier.json")
    edit(broken / "espalier.json", put("files", value={"router.safetensors": "00"}))
    fails(broken, "router.safetensors")
