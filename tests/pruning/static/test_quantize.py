"""`espalier quantize` on tiny checkpoints: what comes out, here and in transformers; kills; what is refused."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from checkpoints.shipped import resolve
from evals import inspect
from models.checkpoint import load, open_transformers, sha256, weight_files
from models.errors import CheckpointError
from models.manifest import Manifest, read_manifest, write_manifest
from models.quantized import Nf4Linear, bitsandbytes, dequantize_4bit, read_dense
from models.run_state import RunStateError
from models.saving import plain_name
from pruning import samples
from pruning.dynamic.router_file import load_router
from pruning.samples import DataError
from pruning.static import held_out, quantize
from pruning.static.fitness import Divergence
from pruning.static.packing import pack
from pruning.static.recipe import RecipeError
from tests.models.hub import hub_config, write_hub
from tests.pruning.kills import Killed, die_at
from tests.server.tiny import answer, new_engine

library = pytest.importorskip("bitsandbytes")


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "PICTURES", 4)


def run(checkpoint: Path, out: Path, **given: Any) -> Manifest:
    return quantize.run(checkpoint, out, **{"data": "world", "count": 4, "quiet": True, **given})


def values(directory: Path) -> dict[str, Tensor]:
    """The quantized matrices, by plain name."""
    stored = {key: tensor for file in weight_files(directory) for key, tensor in load_file(file).items()}
    dense = read_dense(weight_files(directory), torch.float32)
    return {plain_name(key): dense[key] for key, tensor in stored.items() if key in dense and tensor.dtype == torch.uint8}


# ---- what comes out


def test_transformers_loads_the_same_weights(dense, tmp_path):
    run(dense, tmp_path / "out")
    ours, model = values(tmp_path / "out"), LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    theirs = {plain_name(f"{name}.weight"): m.weight for name, m in model.named_modules() if isinstance(m, library.nn.Linear4bit)}
    assert theirs.keys() == ours.keys()
    for name, weight in theirs.items():
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state, torch.float32), ours[name]), name
    assert [name for name, module in model.named_modules() if type(module) is nn.Linear] == ["lm_head"]


def test_the_server_holds_the_very_codes_that_are_saved(dense, tmp_path):
    run(dense, tmp_path / "out")
    loaded, saved = load(tmp_path / "out"), values(tmp_path / "out")
    assert loaded.quantization == "nf4"
    for index, layer in enumerate(loaded.model.decoder_layers):
        assert isinstance(layer.down, Nf4Linear) and isinstance(layer.qkv, Nf4Linear)
        down = dequantize_4bit(layer.down.codes, layer.down.state, torch.float32)
        assert torch.equal(down, saved[f"language.{index}.mlp.down_proj.weight"])
        qkv = dequantize_4bit(layer.qkv.codes, layer.qkv.state, torch.float32)
        parts = [saved[f"language.{index}.self_attn.{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(qkv, torch.cat(parts))
    assert answer(new_engine(loaded), 0).finished


def test_it_is_nearer_to_dense_than_rounding_to_nearest(dense, tmp_path):
    run(dense, tmp_path / "out", count=16)
    source = open_transformers(dense)
    packed = [pack(source.preprocessor, sample) for sample in samples.read("world", 4, 9)]
    found = {}
    with torch.no_grad():
        divergence = Divergence.from_dense(source.model, packed)
        matrices = {plain_name(f"{name}.weight"): m.weight for name, m in source.model.named_modules() if type(m) is nn.Linear}
        for name, weight in values(tmp_path / "out").items():
            if name.startswith("language."):
                codes, state = bitsandbytes().functional.quantize_4bit(matrices[name], blocksize=64, quant_type="nf4")
                found[name] = (dequantize_4bit(codes, state, torch.float32), weight)
        divergences = []
        for rounding in (0, 1):
            for name, both in found.items():
                matrices[name].copy_(both[rounding])
            divergences.append(float(divergence(range(4)).mean()))
    assert divergences[1] < 0.7 * divergences[0]


def test_masks_and_the_router_stay(tmp_path):
    """The shipped checkpoint: half of its weights are zeros, and its router holds for the rounded weights."""
    manifest = run(resolve("embedded"), tmp_path / "out", dtype="float32")
    with safe_open(resolve("embedded") / "model.safetensors", "pt") as file:
        before = {plain_name(key): file.get_tensor(key) for key in file.keys()}
    for name, weight in values(tmp_path / "out").items():
        assert not weight[before[name] == 0].any(), name
    assert manifest.pruning == read_manifest(resolve("embedded")).pruning
    assert load_router(load(tmp_path / "out"))


def test_a_read_only_checkpoint_makes_a_writable_one(dense, tmp_path):
    source = Path(shutil.copytree(dense, tmp_path / "source"))
    router = source / "router.safetensors"
    router.write_bytes(b"copied as it is")
    write_manifest(source, read_manifest(source).model_copy(update={"files": {router.name: sha256(router)}}))
    for path in source.iterdir():
        path.chmod(0o444)
    run(source, tmp_path / "out")
    assert (tmp_path / "out" / router.name).read_bytes() == router.read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir() if not path.stat().st_mode & stat.S_IWUSR] == []


def test_the_manifest_tells_how_and_at_what_cost(dense, tmp_path, capsys):
    manifest = run(dense, tmp_path / "out", seed=3)
    found = manifest.quantization
    assert found and found.held_out and found.held_out.questions == 4
    assert (found.source, found.data, found.samples, found.seed) == ("dense", "world", 4, 3)
    inspect.run(tmp_path / "out")
    told = " ".join(capsys.readouterr().out.split())
    assert f"rounded from dense {found.fingerprint}: nf4, GPTQ on 4 samples of world, seed 3" in told
    assert "4 held-out questions" in told and "pruned elsewhere" not in told


def test_shards_keep_their_index_and_the_file_its_dtype(tmp_path):
    source = write_hub(tmp_path / "dense", hub_config("llava", "llama", "siglip"), max_shard_size="100KB")
    run(source, tmp_path / "out", dtype="bfloat16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    held = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held |= dict.fromkeys(file.keys(), path.name)
    assert index == held and len(set(held.values())) > 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "float32"
    model = load(tmp_path / "out").model
    assert {name: matrix.format for name, matrix in model.linears().items() if matrix.format != "nf4"} == {"head": "dense"}
    assert model.dtype == torch.float32


def test_a_tied_embedding_is_served_in_8_bits(tmp_path):
    config = hub_config("llava")
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    source = write_hub(tmp_path / "dense", config)
    run(source, tmp_path / "out")
    assert load(tmp_path / "out").model.bytes_by_format() == load(source, quantization="nf4").model.bytes_by_format()


def test_the_same_seed_makes_the_same_files(dense, tmp_path):
    files = run(dense, tmp_path / "once").files
    assert run(dense, tmp_path / "again").files == files
    assert run(dense, tmp_path / "other", seed=1).files != files


# ---- kills


@pytest.mark.parametrize(("owner", "name", "total"), [(quantize, "for_each_matrix", 3), (held_out, "_compare", 2)])
def test_a_killed_run_repeats_nothing_that_was_finished(dense, tmp_path, monkeypatch, owner, name, total):
    whole = run(dense, tmp_path / "whole")
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, 2)
        with pytest.raises(Killed):
            run(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RunStateError, match=r"out\.work holds an unfinished run of another recipe"):
        run(dense, tmp_path / "out", seed=1)
    again = die_at(monkeypatch, owner, name, -1)
    assert run(dense, tmp_path / "out") == whole
    assert again[0] == total - 1
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


# ---- what is refused


def test_what_is_in_4_bits_already_is_refused(dense, tmp_path):
    run(dense, tmp_path / "once")
    with pytest.raises(CheckpointError, match="holds nf4 weights, which cannot be changed; take the dense checkpoint"):
        run(tmp_path / "once", tmp_path / "twice")


def test_paths_and_data_that_cannot_be_used_are_refused(dense, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="exists; name a directory that does not"):
        run(dense, tmp_path)
    with pytest.raises(RecipeError, match="is not a directory; create it first"):
        run(dense, tmp_path / "no" / "out")
    with pytest.raises(DataError, match=r"data: nowhere\.jsonl is not a file"):
        run(dense, tmp_path / "out", data="nowhere.jsonl")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        run(tmp_path, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(RecipeError, match=r"GB free and up to .* GB are needed; make room"):
        run(dense, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_it_is_said_what_to_install(dense, tmp_path, monkeypatch):
    bitsandbytes.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(CheckpointError, match=r"pip install -e '\.\[quant\]'"):
        run(dense, tmp_path / "out")
    assert not list(tmp_path.iterdir())
