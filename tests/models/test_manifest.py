"""The manifest comes back as it was written, and what is wrong in it is named."""

from __future__ import annotations

import json

import pytest

from models.checkpoint import load, sha256
from models.manifest import Calibration, Manifest, read_manifest, write_manifest
from tests.models.saved import copy_to_break, edit, edit_tensors, fails, put, saved_checkpoint  # noqa: F401


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
        (put("calibration", "layer_change", value=[0.1, float("nan"), 1.0]), "calibration.layer_change.1"),
        (put("calibration", "layer_change", value=[0.1, 1e308, 1.0]), "calibration.layer_change.1"),
        (put("calibration", "mood", value="good"), "calibration.mood"),
        (put("calibration", "layer_change", value=[0.1]), "calibration.layer_change"),
        (put("cards", value={"strong": 3}), "cards.strong"),
        (put("patch_ratio", value={"strong": 0}), "patch_ratio.strong"),
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
    manifest = Manifest(name="mine", base_model="llava", built_from="0123abcd", cards={"off": {}}, router={"shape": {}})
    assert manifest.derive(files={"a": "b"}) == Manifest(base_model="llava", files={"a": "b"})


def test_files_are_checked_against_the_manifest(broken):
    weights = broken / "model.safetensors"
    edit(broken / "espalier.json", put("files", value={weights.name: sha256(weights)}))
    assert load(broken).manifest.files
    edit_tensors(broken, lambda tensors: next(iter(tensors.values())).add_(1))
    fails(broken, "model.safetensors", "espalier.json")
    edit(broken / "espalier.json", put("files", value={"router.safetensors": "00"}))
    fails(broken, "router.safetensors")
