"""Where the questions of each task come from: committed samples of drawings, and stand-ins for packages that are fetched."""

from __future__ import annotations

import io
import json
import shutil
import stat
import struct
import sys
import zlib
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
from PIL import Image
from typer.testing import CliRunner

from checkpoints import things as world
from espalier import OfficialTask, OwnTask, app
from evals import debian, photographs
from evals.easy_vqa import write_rows
from evals.exam import Item, Task, run
from evals.qt_resources import read_resources
from evals.tasks import SOURCES, open_task
from pruning.samples import read
from tests.server.tiny import write

STAMPS = {
    "animals/birds/drake": "A drake.",
    "animals/birds/quetzal": "A quetzal.",
    "animals/mammals/pig_golden": "A Tamworth pig.",
    "animals/mammals/cartoon/pig": "A pig.",
    "animals/mammals/yak": "A yak.",
    "food/fruit/orange_seville": "A Seville orange, also called a bitter orange.",
    "household/Lightbulb": "A lightbulb.",
    "household/glass": "A glass of water.",
    "vehicles/auto/beetle": "A VW Beetle.",
    "town/flags/redflag": "A red flag.",
}


@pytest.fixture(autouse=True)
def samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_THINGS", "samples")


@pytest.fixture(name="stamps")
def stamps_folder(tmp_path: Path) -> Path:
    """A red cut-out with a wide clear margin for each caption."""
    folder = tmp_path / "stamps"
    for name, caption in STAMPS.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = Image.new("RGBA", (40, 60))
        cut.paste((250, 0, 0, 255), (10, 20, 30, 30))
        cut.save(path)
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Etwas anderes.\n", "utf-8")
    return folder


def first(count: int, task: str, **options: str) -> list[tuple[Image.Image, Item]]:
    return list(islice(open_task(task, **options).items, count))


# ---- things


def test_things_are_of_all_families_and_own_answers_are_right():
    asked = first(10, "things")
    assert [item.family for _, item in asked] == list(world.TURNS)
    assert all(picture.size == (world.SIZE, world.SIZE) and item.judge(item.answer) for picture, item in asked)
    assert not any(item.judge("no idea") for _, item in asked)
    again = first(4, "things")
    assert all(picture == before and item.text == same.text for (picture, item), (before, same) in zip(again, asked, strict=False))


def test_a_family_held_out_wordings_and_a_split_can_be_asked():
    assert {item.family for _, item in first(4, "things", family="boards")} == {"boards"}
    seen, held_out = ({item.text.lower() for _, item in first(12, "names", paraphrase=one)} for one in ("seen", "held_out"))
    assert len(held_out) > 1 and seen.isdisjoint(held_out)
    known, test = ([item.answer for _, item in first(8, "things", split=split)] for split in ("known", "test"))
    assert known != test


def test_names_are_asked_of_one_thing_and_synonyms_are_right():
    for picture, item in first(12, "names"):
        thing = world.catalogue.load()[item.answer]
        assert (picture.width, item.family, item.type) == (world.SIZE, thing.kind.name, "what")
        assert all(item.judge(name) and item.judge(f"It is {thing.one}.") for name in thing.names)
        assert not item.judge(f"not {thing.name}")


# ---- photographs


def test_captions_tell_the_names_and_folders_the_kinds(stamps):
    found = {one.path.stem: one for one in photographs.photographs(stamps)}
    assert found.keys() == {"drake", "quetzal", "pig_golden", "yak", "orange_seville", "Lightbulb", "beetle"}
    names = {name: one.names[0] if one.names else None for name, one in found.items()}
    assert names == {
        "drake": "duck", "quetzal": "bird", "pig_golden": "pig", "yak": None, "orange_seville": "orange",
        "Lightbulb": "light bulb", "beetle": "car",
    }  # fmt: skip
    assert [name for name, one in found.items() if one.general] == ["quetzal"]
    kinds = {name: one.kinds[0] for name, one in found.items()}
    assert (kinds["drake"], kinds["yak"], kinds["orange_seville"], kinds["beetle"]) == ("bird", "animal", "fruit", "vehicle")
    assert "animal" in found["drake"].kinds and "food" in found["orange_seville"].kinds


def install(root: Path, package: debian.Package, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package be installed, with a folder's files."""
    shutil.copytree(files, root / package.inside)
    monkeypatch.setattr(debian, "ROOT", root)


def test_photographs_are_asked_on_both_grounds(stamps, tmp_path, monkeypatch):
    install(tmp_path / "root", photographs.STAMPS, stamps, monkeypatch)
    asked = first(100, "photographs")
    assert {(item.family, item.type) for _, item in asked} == {
        (family, ground) for family in ("name", "general", "kind") for ground in ("plain", "textured")
    }
    assert len(asked) == 2 * (6 + 7)
    pigs = [item for _, item in asked if item.answer == "pig"]
    assert [item.type for item in pigs] == ["plain", "textured"]
    assert pigs[0].judge("A pig.") and pigs[0].judge("a Tamworth pig") and not pigs[0].judge("cow")


def test_a_cut_out_stands_large_in_the_middle(stamps):
    picture = photographs.paste(stamps / "animals/mammals/yak.png", Image.new("RGB", (100, 100), (0, 0, 255)))
    red = picture.getchannel("R").point(lambda value: 255 * (value > 128))
    assert red.getbbox() == (10, 30, 90, 70)


def test_photographs_are_fetched_once_into_the_cache(stamps, tmp_path, monkeypatch):
    """Two commands of Debian's, played by scripts: one leaves an archive, the other unpacks it."""
    commands = tmp_path / "bin"
    commands.mkdir()
    inside = photographs.STAMPS.inside
    scripts = {"apt-get": "echo > $2.deb", "dpkg-deb": f"mkdir -p {inside} && cp -r {stamps}/* {inside}"}
    for name, script in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/called\n{script}\n")
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(debian, "ROOT", tmp_path / "none")
    for _ in range(2):
        assert len(photographs.photographs(photographs.STAMPS.folder())) == 7
    assert (tmp_path / "called").read_text().split() == ["apt-get", "dpkg-deb"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [photographs.STAMPS.name]


@pytest.mark.parametrize(
    ("script", "message"),
    [(None, "no apt-get or dpkg-deb here"), ("echo E: no such package >&2; exit 100", r"apt-get cannot get .*no such package")],
)
def test_photographs_that_cannot_be_had_leave_nothing(tmp_path, monkeypatch, script, message):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("apt-get", "dpkg-deb") if script else ():
        (commands / name).write_text(f"#!/bin/sh\n{script}\n")
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(debian, "ROOT", tmp_path / "none")
    with pytest.raises(ValueError, match=rf"{message}.*; install the package by other means, or put its"):
        first(1, "photographs")
    assert not list(tmp_path.glob("cache/*"))


def resources(files: dict[str, bytes], version: int = 3) -> bytes:
    """A Qt resource file: a folder `pictures` with these files, every second one compressed."""
    texts = ["pictures", *files]
    places = [sum(6 + 2 * len(text) for text in texts[:number]) for number in range(len(texts))]
    names = b"".join(struct.pack(">HI", len(text), 0) + text.encode("utf-16-be") for text in texts)
    contents = [struct.pack(">I", len(raw)) + zlib.compress(raw) if n % 2 else raw for n, raw in enumerate(files.values())]
    entry = struct.Struct(">IHIIQ")
    entries = [entry.pack(0, 2, 1, 1, 0), entry.pack(places[0], 2, len(files), 2, 0)]
    data = b""
    for number, content in enumerate(contents):
        entries.append(struct.pack(">IHHHIQ", places[number + 1], number % 2, 0, 0, len(data), 0))
        data += struct.pack(">I", len(content)) + content
    tree = b"".join(entries)
    return struct.pack(">4s4I", b"qres", version, 20, 20 + len(tree), 20 + len(tree) + len(data)) + tree + data + names


def test_files_are_read_from_qt_resources(tmp_path):
    files = {"one.webp": b"first", "zwei – 2.webp": b"second" * 9, "three.json": b""}
    path = tmp_path / "some.rcc"
    path.write_bytes(resources(files))
    assert dict(read_resources(path)) == {f"/pictures/{name}": content for name, content in files.items()}
    path.write_bytes(resources(files, version=1))
    with pytest.raises(ValueError, match=r"some.rcc is not a Qt resource file of format 2 or 3"):
        next(read_resources(path))


def test_whole_photographs_are_those_of_the_validation_split(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "_WHOLE", {"zoo": {"calf": "cow", "owl": "owl"}})
    picture = io.BytesIO()
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(picture, "WEBP")
    (tmp_path / "files").mkdir()
    (tmp_path / "files/zoo.rcc").write_bytes(resources(dict.fromkeys(("calf.webp", "owl.webp", "hen.webp"), picture.getvalue())))
    install(tmp_path / "root", photographs.WHOLE, tmp_path / "files", monkeypatch)
    asked = first(10, "photographs", split="validation")
    assert sorted((item.family, item.answer) for _, item in asked) == [
        ("kind", "animal"), ("kind", "bird"), ("name", "cow"), ("name", "owl"),
    ]  # fmt: skip
    assert all(picture.size == (40, 30) and picture.getpixel((0, 0)) == (255, 255, 255) for picture, _ in asked)


def test_whole_photographs_are_of_known_things():
    assert {name for names in photographs._WHOLE.values() for name in names.values()} <= set(world.NAMES)


# ---- easy-VQA


@pytest.fixture
def easy_vqa_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, with two pictures."""
    for number in (0, 1):
        Image.new("RGBA", (64, 64), (0, 128, 128, 255)).save(tmp_path / f"{number}.png")
    questions = [("What color is the shape?", "teal", 1), ("Is there a circle?", "no", 0), ("What shape is it?", "triangle", 1)]
    package = SimpleNamespace(
        get_test_questions=lambda: tuple(map(list, zip(*questions, strict=True))),
        get_test_image_paths=lambda: {number: str(tmp_path / f"{number}.png") for number in (0, 1)},
        get_train_questions=lambda: (["what color is it?", "is there a circle?"], ["teal", "no"], [3, 3]),
        get_train_image_paths=lambda: {3: str(tmp_path / "1.png")},
    )
    monkeypatch.setitem(sys.modules, "easy_vqa", package)


def test_easy_vqa_is_asked_whole_and_matched_exactly(easy_vqa_package):
    asked = first(9, "easy-vqa")
    assert [(item.text, item.answer, item.type) for _, item in asked] == [
        ("What color is the shape?", "teal", "color"),
        ("Is there a circle?", "no", "yes or no"),
        ("What shape is it?", "triangle", "shape"),
    ]
    assert {picture.mode for picture, _ in asked} == {"RGB"}
    assert asked[0][1].judge("Teal.") and not asked[0][1].judge("turquoise")
    assert [item.answer for _, item in first(9, "easy-vqa", split="train")] == ["teal", "no"]
    with pytest.raises(ValueError, match="split 'known' is not one of test, train"):
        first(1, "easy-vqa", split="known")


def test_the_training_split_becomes_rows_to_finetune_on(easy_vqa_package, tmp_path):
    (sample,) = read(str(write_rows(tmp_path / "rows")), 1, seed=0)
    assert sample.turns == [("what color is it?", "teal"), ("is there a circle?", "no")]
    assert sample.image.size == (64, 64)


def test_a_task_shorter_than_its_limit_ends(easy_vqa_package, tmp_path, capsys):
    document = run(write(tmp_path / "tiny"), open_task("easy-vqa"), "off", None, "cpu", "float32", quiet=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert (document["task"], document["n"], document["failed"]) == ("easy-vqa", 3, 0)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ValueError, match=r"pip install easy-vqa==1\.0"):
        first(1, "easy-vqa")
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    world.drawings.drawing.cache_clear()
    with pytest.raises(ValueError, match="pip install resvg-py"):
        first(1, "names")


# ---- the command


def test_every_task_can_be_asked_for_by_name():
    assert set(get_args(OwnTask)) == {*SOURCES, "perplexity"}
    shown = CliRunner().invoke(app, ["eval", "--help"]).output
    assert all(task in shown for task in (*get_args(OwnTask), *get_args(OfficialTask)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "scenes", "--family", "shapes"], "the task scenes has no --family"),
        (["--task", "photographs", "--family", "kind"], "the task photographs has no --family"),
        (["--task", "photographs", "--split", "train"], "split 'train' is not one of validation, test"),
        (["--task", "perplexity", "--split", "test"], "the task perplexity has no --split"),
        (["--task", "names", "--against", "x.gguf"], "the task names has no --against"),
        (["--task", "things", "--split", "half"], "split 'half' is not one of train, known, validation, test"),
        (["--task", "things", "--family", "cars"], "family 'cars' is not one of one, several"),
        (["--task", "riddles"], "'riddles' is not one of"),
    ],
)
def test_what_a_task_does_not_have_is_said(given, message):
    result = CliRunner().invoke(app, ["eval", "embedded-dense", "--limit", "1", *given])
    assert result.exit_code != 0
    assert message in result.output and "Traceback" not in result.output


def test_a_document_says_what_was_asked():
    task: Task = open_task("things", 7, family="one", split="known")
    assert (task.limit, task.about) == (7, {"task": "things", "split": "known", "family": "one", "paraphrase": "seen"})
    assert open_task("names").about == {"task": "names", "split": "test", "paraphrase": "seen"}
