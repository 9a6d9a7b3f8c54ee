"""Samples: which data a run takes, what a line holds, and that its picture is the one that the server sees."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from checkpoints.shipped import SHIPPED
from models.manifest import Manifest, write_manifest
from models.preprocess import Preprocessor
from pruning.dynamic.training import calibrate
from pruning.dynamic.training import train as route
from pruning.dynamic.training.config import TrainingConfig
from pruning.finetuning import train as finetune
from pruning.finetuning.config import FinetuneConfig
from pruning.samples import THINGS, WORLD, DataError, check, choose, content, read, read_rest
from pruning.static import pipeline, quantize
from pruning.static.recipe import Recipe
from server import media
from server.settings import Settings
from tests.pruning.kills import die_at
from tests.pruning.rows import write_rows
from tests.server.tiny import config, processor

PREPROCESSOR = Preprocessor(processor(), config())


def line(path: Path, entry: dict[str, Any]) -> str:
    path.write_text(json.dumps(entry) + "\n")
    return str(path)


# ---- the picture


def gradient(mode: str) -> Image.Image:
    """Another color, brightness and transparency at every place, so that turning or blending shows."""
    x, y = np.meshgrid(np.linspace(0, 255, 40), np.linspace(0, 255, 24))
    bands = np.stack([x, y, 255 - x, 255 - y], -1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray((x * 257).astype(np.uint16))
    if mode in ("LA", "RGBA", "CMYK"):
        return Image.frombytes(mode, (40, 24), bands[..., : len(mode)].tobytes())
    return Image.fromarray(bands[..., :3]).convert(mode)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "turned JPEG": ("RGB", "JPEG", {"exif": turned()}),
    "turned PNG": ("RGB", "PNG", {"exif": turned()}),
    "turned WebP": ("RGB", "WEBP", {"exif": turned(), "lossless": True}),
    "RGBA": ("RGBA", "PNG", {}),
    "RGBA WebP": ("RGBA", "WEBP", {"lossless": True}),
    "LA": ("LA", "PNG", {}),
    "16-bit grey": ("I;16", "PNG", {}),
    "CMYK JPEG": ("CMYK", "JPEG", {}),
    "palette": ("P", "PNG", {"transparency": 3}),
    "plain JPEG": ("RGB", "JPEG", {}),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_server_and_calibration_see_the_same_picture(kind: str, tmp_path: Path) -> None:
    mode, form, options = FILES[kind]
    file = BytesIO()
    gradient(mode).save(file, form, **options)
    (tmp_path / "picture").write_bytes(file.getvalue())
    data = line(tmp_path / "data.jsonl", {"image": "picture", "question": "What is it?", "answer": "a gradient"})
    (sample,) = read(data, 1, seed=0)
    opened = media.open_all([("image", file.getvalue())], PREPROCESSOR, Settings())
    (served,) = media.decode_all(opened, PREPROCESSOR)
    assert media.digest(sample.image) == served.digest
    assert (PREPROCESSOR.picture(sample.image).pixels == served.picture.pixels).all()
    assert sample.image.size == ((24, 40) if "turned" in kind else (40, 24))
    assert np.asarray(sample.image).std() > 20, "it is not burnt out"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"BM6", "not a JPEG, PNG, WebP, GIF or AVIF file"), (b"\x89PNG\r\n\x1a\n", "broken or cut short"), (None, "No such file")],
)
def test_a_picture_that_cannot_be_read_names_its_line(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "picture").write_bytes(content)
    data = line(tmp_path / "data.jsonl", {"image": "picture", "question": "What is it?", "answer": "nothing"})
    with pytest.raises(DataError, match=rf"data\.jsonl, line 1: .*{reason}"):
        list(read(data, 1, seed=0))


# ---- the turns


def test_both_forms_of_a_line_are_read(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    chat = [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"},
    ]  # fmt: skip
    data = line(tmp_path / "chat.jsonl", {"image": "red.png", "conversations": chat})
    assert next(read(data, 1, seed=0)).turns == [("What is it?", "red"), ("Sure?", "yes")]
    assert next(read(data, 1, seed=0, answered=False)).turns == [("What is it?", ""), ("Sure?", "")]
    data = line(tmp_path / "plain.jsonl", {"image": "red.png", "question": "What is it?"})
    assert next(read(data, 1, seed=0, answered=False)).turns == [("What is it?", "")]
    with pytest.raises(DataError, match="line 1: KeyError: 'answer'"):
        next(read(data, 1, seed=0))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"question": "How many?", "answer": 3}, "TypeError: a question or answer must be a string, not 3"),
        ({"question": "How many?", "answer": None}, "not null"),
        ({"question": ["How many?"], "answer": "3"}, "not .\"How many"),
        ({"conversations": []}, "its conversations are empty"),
        ({"conversations": [{"from": "human", "value": "How many?"}]}, "the last of its conversations has no answer"),
        ({"conversations": [{"value": "How many?"}, {"value": 3}]}, "not 3"),
        ({"image": 3, "question": "How many?", "answer": "3"}, "TypeError"),
        ({"image": "none.png", "question": "How many?", "answer": "3"}, "FileNotFoundError"),
    ],
)
def test_a_bad_row_is_named_before_any_is_read(entry: dict[str, Any], reason: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path, range(4))
    with open(data, "a") as file:
        file.write("\n" + json.dumps({"image": "0.png"} | entry))
    count = 5 if entry.get("image") == "none.png" else 4
    with pytest.raises(DataError, match=rf"data\.jsonl, line 5: .*{reason}"):
        check(data, count, 0)


RUNS: dict[str, tuple[ModuleType, str, Callable[[str, Path, Path], Any]]] = {
    "prune": (pipeline, "open_transformers", lambda data, source, out: pipeline.run(Recipe(samples=4, data=data), source, out)),
    "quantize": (quantize, "open_transformers", lambda data, source, out: quantize.run(source, out, data, 4)),
    "finetune": (
        finetune, "open_transformers",
        lambda data, source, out: finetune.run(FinetuneConfig(samples=4, batch_size=2, data=data), source, out),
    ),
    "route": (route, "load", lambda data, source, out: route.run(TrainingConfig(pictures=8, data=data), source, out)),
    "calibrate": (calibrate, "load", lambda data, source, out: calibrate.calibrate(source, data, 4, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_no_run_opens_a_model_before_its_rows_are_checked(
    name: str, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, opens, run = RUNS[name]
    data = write_rows(tmp_path, range(8))
    for number in range(8):
        (tmp_path / f"{number}.png").unlink()
    called = die_at(monkeypatch, module, opens, 1)
    monkeypatch.setattr(quantize, "bitsandbytes", lambda: None)
    with pytest.raises(DataError, match=r"data\.jsonl, line \d: FileNotFoundError"):
        run(data, dense, tmp_path / "out")
    assert called == [0]


def test_the_world_is_drawn_by_seed() -> None:
    first, again, other = (list(read(WORLD, 4, seed)) for seed in (0, 0, 1))
    assert [sample.image.tobytes() for sample in first] == [sample.image.tobytes() for sample in again]
    assert {sample.image.tobytes() for sample in first}.isdisjoint(sample.image.tobytes() for sample in other)
    assert all(answer for sample in first for _, answer in sample.turns)


def test_the_rest_is_what_was_not_read(tmp_path: Path) -> None:
    used, rest = list(read(WORLD, 4, seed=3)), read_rest(WORLD, 4, 4, seed=3)
    assert {sample.image.tobytes() for sample in used}.isdisjoint(sample.image.tobytes() for sample in rest)
    data = write_rows(tmp_path, range(9))
    asked = [sample.turns[0][0] for sample in [*read(data, 6, seed=1), *read_rest(data, 64, 6, seed=1)]]
    assert sorted(asked) == [f"{number}/0" for number in range(9)]
    assert len(read_rest(data, 2, 6, seed=1)) == 2 and not read_rest(data, 2, 9, seed=1)


def test_rows_about_one_picture_are_one_sample(tmp_path: Path) -> None:
    data = write_rows(tmp_path, [number % 5 for number in range(15)])
    used, rest = list(read(data, 3, seed=0)), read_rest(data, 64, 3, seed=0)
    told = sorted([question for question, _ in sample.turns] for sample in [*used, *rest])
    assert told == [[f"{picture}/{turn}" for turn in range(3)] for picture in range(5)], "in the order of the file"
    assert len(rest) == 2
    with pytest.raises(DataError, match="has 5 pictures and 6 are asked for"):
        read(data, 6, seed=0)


def test_fewer_samples_are_the_first_of_more(tmp_path: Path) -> None:
    data = write_rows(tmp_path, range(40))
    more, fewer = ([sample.turns for sample in read(data, count, seed=4)] for count in (30, 3))
    assert more[:3] == fewer


@pytest.mark.parametrize("data", ["file", WORLD])
def test_the_rest_is_not_what_earlier_runs_saw(data: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path, range(12)) if data == "file" else data
    runs = [(3, 0), (5, 0), (2, 1)]
    seen = {sample.image.tobytes() for count, seed in runs for sample in read(data, count, seed)}
    rest = [sample.image.tobytes() for sample in read_rest(data, 4, 3, 0, earlier=runs[1:])]
    assert len(rest) == 4 and seen.isdisjoint(rest)


def test_things_are_drawn_by_seed_and_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_THINGS", "samples")
    first, again = ([sample.image.tobytes() for sample in read(THINGS, 3, seed=0)] for _ in range(2))
    assert first == again
    charts = next(read(THINGS, 1, seed=0, families=("charts",)))
    assert any("bar" in question for question, _ in charts.turns)


# ---- the choice


def test_a_checkpoint_takes_the_data_it_was_trained_on() -> None:
    assert choose(None, SHIPPED["embedded"]) == WORLD
    assert content(WORLD) == ""


def test_another_checkpoint_is_not_measured_on_drawings_unasked(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest())
    with pytest.raises(DataError, match=r"needs --data FILE.*--data world or things takes the drawings"):
        choose(None, tmp_path)
    assert choose(WORLD, tmp_path) == WORLD
    data = line(tmp_path / "data.jsonl", {})
    assert choose(data, tmp_path) == data
    with pytest.raises(DataError, match="elsewhere is not a file; name a JSONL file, `world` or `things`"):
        choose("elsewhere", tmp_path)


def test_a_file_that_changes_is_other_data(tmp_path: Path) -> None:
    before = content(line(tmp_path / "data.jsonl", {"a": 1}))
    assert before and before != content(line(tmp_path / "data.jsonl", {"a": 2}))
