"""The world of things, drawn from the committed samples; nothing is fetched."""

from __future__ import annotations

import hashlib
import io
import json
import string
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from checkpoints import things
from checkpoints.things import catalogue, drawings, fonts, paint
from checkpoints.things import things as families
from checkpoints.things.paraphrases import PARAPHRASES
from checkpoints.things.scene import NUMBERS, PLACES


def _forget() -> None:
    for cached in (drawings.names, drawings.drawing, drawings._archive, families.drawable):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_THINGS", "samples")


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache to fetch into, and no samples."""
    monkeypatch.delenv("ESPALIER_THINGS")
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path))
    _forget()
    yield tmp_path
    _forget()


def _scenes(family: str, count: int = 25, split: str = "train") -> Iterator[things.Scene]:
    return (things.draw(split, i, family, size=256) for i in range(count))


def _of_type(scene: things.Scene, type_: str) -> list[things.Question]:
    return [question for question in scene.questions if question.type == type_]


@pytest.mark.parametrize("family", things.FAMILIES)
def test_the_same_arguments_draw_the_same_scene(family: str) -> None:
    first, again, other = (things.draw("train", index, family, size=192) for index in (7, 7, 8))
    assert np.array_equal(first.image, again.image)
    assert first.questions == again.questions and first.marks == again.marks
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("split", things.SPLITS)
def test_only_its_own_hands_draw_a_split(split: str) -> None:
    drawn = {mark.hand for family in ("one", "several") for scene in _scenes(family, 12, split) for mark in scene.marks}
    assert drawn and drawn <= set(things.HANDS[split])
    assert ("openmoji" in things.HANDS[split]) == (split == "test")


def test_splits_share_no_picture() -> None:
    train, known = (things.draw(split, 3, "boards", size=128).image for split in ("train", "known"))
    assert not np.array_equal(train, known)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split 'dev' is not one of train"),
        ({"family": "maps"}, "family 'maps' is not one of one"),
        ({"paraphrase": "odd"}, "paraphrase 'odd' is not one of seen, held_out"),
        ({"hands": ("openmoji",)}, "openmoji is the test hand"),
    ],
)
def test_what_there_is_not_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        things.draw(**{"split": "train", "index": 0, **arguments})


@pytest.mark.parametrize("family", things.FAMILIES)
def test_pictures_have_the_size_asked_for_and_their_questions(family: str) -> None:
    for scene in _scenes(family, 6):
        assert (scene.image.mode, scene.image.size, scene.family) == ("RGB", (256, 256), family)
        assert len(scene.questions) >= 5
        for question in scene.questions:
            assert question.text and question.answer and "{" not in question.text
            assert things.matches(question.answer, question)
        for mark in scene.marks:
            left, top, right, bottom = mark.box
            assert -0.01 <= left < right <= 1.01 and -0.01 <= top < bottom <= 1.01


def test_one_thing_is_named_and_placed() -> None:
    known = catalogue.load()
    for scene in _scenes("one"):
        (mark,) = scene.marks
        thing = known[mark.name]
        for question in _of_type(scene, "what"):
            assert question.answer == thing.name and all(things.matches(name, question) for name in thing.names)
        for question in _of_type(scene, "kind"):
            assert things.matches(thing.kind.name, question)
        for fact in families.FACTS:
            for question in _of_type(scene, fact):
                assert question.answer == ("yes" if fact in thing.facts else "no")


def test_counts_and_lists_are_those_of_the_marks() -> None:
    for scene in _scenes("several", 40):
        counts = Counter(mark.name for mark in scene.marks)
        for question in _of_type(scene, "count_all"):
            assert question.answer == NUMBERS[len(scene.marks)]
        for question in _of_type(scene, "list"):
            assert len(question.parts) == len(counts)
            assert things.matches(", ".join(counts), question)
            assert not things.matches(", ".join([*counts, "zebra"]), question)
            if len(counts) > 1:
                assert not things.matches(next(iter(counts)), question)


def test_relations_are_those_of_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    for type_ in ("left_right", "above_below", "larger", "smaller", "where", "exists", "count"):
        slots = {"where": "{the}", "exists": "{one}", "count": "{many}"}.get(type_, "{the}|{other}")
        monkeypatch.setitem(PARAPHRASES, type_, {"seen": (slots,)})
    known = catalogue.load()
    by_the = {thing.the.capitalize(): name for name, thing in known.items()}
    checked = Counter[str]()
    for scene in _scenes("several", 60):
        alone = {mark.name: mark for mark in scene.marks}
        counts = Counter(mark.name for mark in scene.marks)
        for question in scene.questions:
            text = question.text[0].upper() + question.text[1:]
            names = [by_the.get(part[0].upper() + part[1:], "") for part in text.split("|")]
            if question.type in ("left_right", "above_below"):
                axis = ("left_right", "above_below").index(question.type)
                a, b = (alone[name].center[axis] for name in names)
                assert question.answer == (("left", "above") if a < b else ("right", "below"))[axis]
            elif question.type in ("larger", "smaller"):
                pick = max if question.type == "larger" else min
                assert question.answer == pick(names, key=lambda name: alone[name].area)
            elif question.type == "where":
                x, y = alone[names[0]].center
                assert question.answer == list(PLACES)[int(y * 3) * 3 + int(x * 3)]
            elif question.type == "exists":
                asked = {name for name, thing in known.items() if thing.one.lower() == text.lower()}
                assert question.answer == ("yes" if asked & counts.keys() else "no")
            elif question.type == "count":
                (asked,) = (name for name, thing in known.items() if thing.many.lower() == text.lower())
                assert question.answer == NUMBERS[counts[asked]]
            else:
                continue
            checked[question.type] += 1
    assert min(checked.values()) > 5 and len(checked) == 7


def test_simple_shapes_have_their_color() -> None:
    checked = 0
    for i in range(60):
        scene = things.draw("test", i, "shapes", size=256)
        if len(scene.marks) == 1 and (question := next(iter(_of_type(scene, "color")), None)):
            x, y = scene.marks[0].center
            if scene.marks[0].name.split()[1] in ("circle", "rectangle"):
                pixel = scene.image.getpixel((round(x * 256), round(y * 256)))
                assert min(paint.COLORS, key=lambda name: paint.distance(paint.COLORS[name], pixel)) == question.answer
                checked += 1
    assert checked > 5


def test_exists_and_not_exists_are_opposites() -> None:
    for scene in _scenes("shapes", 40):
        names = {mark.name for mark in scene.marks}
        for question in _of_type(scene, "exists_not"):
            words = question.text.rstrip("?").split()
            pair = [name for name in (f"{a} {b}" for a, b in pairwise(words)) if name in names]
            if pair:
                assert question.answer == "no"


def test_bars_stand_as_high_as_is_said() -> None:
    checked = 0
    for scene in _scenes("charts", 40):
        if scene.marks[0].kind != "bar":
            continue
        long = {m.name.split()[0]: max(m.box[2] - m.box[0], 0) for m in scene.marks}
        tall = {m.name.split()[0]: m.box[3] - m.box[1] for m in scene.marks}
        lengths = long if len({round(v, 3) for v in tall.values()}) == 1 else tall
        for question in (*_of_type(scene, "tallest"), *_of_type(scene, "shortest")):
            pick = max if question.type == "tallest" else min
            assert question.answer == pick(lengths, key=lengths.__getitem__)
            checked += 1
    assert checked > 20


def test_board_counts_are_those_of_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARAPHRASES, "count", {"seen": ("{many}",)})
    for scene in _scenes("boards", 20):
        cells = Counter(mark.name for mark in scene.marks)
        found = {question.text.lower(): question.answer for question in _of_type(scene, "count")}
        assert found["empty cells"] == NUMBERS[cells["empty cell"]]
        assert found["filled cells"] == NUMBERS[cells.total() - cells["empty cell"]]


def test_signs_say_what_is_read() -> None:
    for scene in _scenes("text", 20):
        said = {mark.name for mark in scene.marks}
        for question in _of_type(scene, "read"):
            assert question.answer in said and things.matches(question.answer.lower(), question)


QUESTION = things.Question("what", "What is this?", "ice cream", ("soft ice cream",))


@pytest.mark.parametrize(
    ("answer", "question", "right"),
    [
        ("Ice cream.", QUESTION, True),
        ("an ice-cream", QUESTION, True),
        ("It is a soft ice cream!", QUESTION, True),
        ("ice", QUESTION, False),
        ("ice cream cake", QUESTION, False),
        ("", QUESTION, False),
        ("2", things.Question("count", "", "two"), True),
        ("Two", things.Question("count", "", "2"), True),
        ("twenty one", things.Question("count", "", "twenty-one"), True),
        ("grey", things.Question("color", "", "gray"), True),
        ("A", things.Question("first", "", "A"), True),
        ("the", things.Question("first", "", "A"), False),
        ("The dog is on the left.", things.Question("where_sentence", "", "", parts=(("left",),)), True),
        ("The dog is on the right.", things.Question("where_sentence", "", "", parts=(("left",),)), False),
        ("two dogs and a cat", things.Question("list", "", "", parts=(("cat",), ("dog", "dogs"))), True),
        ("two dogs, a cat and a cow", things.Question("list", "", "", parts=(("cat",), ("dog", "dogs"))), False),
        ("dogs", things.Question("list", "", "", parts=(("cat",), ("dog", "dogs"))), False),
    ],
)
def test_matches(answer: str, question: things.Question, right: bool) -> None:
    assert things.matches(answer, question) is right


def _slots(wording: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(wording) if name}


@pytest.mark.parametrize("type_", PARAPHRASES)
def test_every_type_has_wordings_of_both_sorts_that_differ(type_: str) -> None:
    seen, held_out = PARAPHRASES[type_]["seen"], PARAPHRASES[type_]["held_out"]
    assert len(seen) >= 3 and len(held_out) >= 2
    assert len({*seen, *held_out}) == len(seen) + len(held_out)
    assert set().union(*map(_slots, held_out)) <= set().union(*map(_slots, seen))


def test_held_out_wordings_are_never_seen_ones() -> None:
    for family in things.FAMILIES:
        for seed in range(5):
            seen, held_out = (things.draw("test", seed, family, size=128, paraphrase=p) for p in ("seen", "held_out"))
            texts = {question.text.lower().rstrip("?.") for question in seen.questions}
            assert not texts & {question.text.lower().rstrip("?.") for question in held_out.questions}


def test_catalogue_is_large_and_consistent() -> None:
    known = catalogue.load()
    assert len(known) >= 300
    for name, thing in known.items():
        assert name == thing.name.lower() and name not in thing.also and thing.icons
        assert name in catalogue.confusable(name)
        assert thing.one and thing.many and thing.kind.name
    drawn = [icon for thing in known.values() for icon in thing.icons]
    assert not [icon for icon, n in Counter(drawn).items() if n > 1], "a drawing has two names"


def test_every_hand_has_samples_with_author_and_license() -> None:
    for hand in drawings.PACKAGES:
        sample = json.loads((drawings.SAMPLES / f"{hand}.json").read_text("utf-8"))
        assert sample["info"]["author"]["name"] and sample["info"]["license"]["spdx"]
        assert len(drawings.names(hand)) >= 8
        image = drawings.drawing(hand, next(icon for _, icon in drawings.every(hand)))
        assert image.mode == "RGBA" and max(image.size) <= drawings.SIZE and image.getchannel("A").getextrema()[1] == 255


def _package(folder: Path, hand: str) -> drawings.Package:
    """A package as npm packs it, made of a hand's samples and put where a fetched one would be."""
    sample = json.loads((drawings.SAMPLES / f"{hand}.json").read_text("utf-8"))
    path = folder / "things" / "npm" / "hand-1.0.tgz"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as archive:
        for member, content in (("icons.json", sample), ("info.json", sample["info"])):
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return drawings.Package("hand", "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_fetched_package_is_rendered_once_and_kept(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drawings.PACKAGES, "twemoji", _package(fetched, "twemoji"))
    path = drawings.build("twemoji")
    before = path.stat().st_mtime_ns
    assert drawings.build("twemoji").stat().st_mtime_ns == before
    assert "frog" in drawings.names("twemoji")
    size = drawings.write_subset("twemoji", fetched / "subset.json", ["frog"])
    assert size == (fetched / "subset.json").stat().st_size
    assert [*json.loads((fetched / "subset.json").read_text())["icons"]] == ["frog"]


def test_another_hash_or_no_npm_is_a_clear_error(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _package(fetched, "twemoji")
    with pytest.raises(drawings.DrawingsError, match=r"is not the hand 1\.0 that is expected; delete it"):
        drawings.fetch(drawings.Package("hand", "1.0", "0" * 64))
    monkeypatch.setattr(drawings.shutil, "which", lambda _: None)
    assert drawings.fetch(package).exists()
    with pytest.raises(drawings.DrawingsError, match=r"install Node\.js"):
        drawings.fetch(drawings.Package("other", "1.0", package.sha256))


def test_unseen_typefaces_are_other_ones() -> None:
    assert set(fonts.UNSEEN) < set(fonts.PACKAGES)
