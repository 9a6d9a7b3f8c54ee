"""The exam: what counts as right, how it is summed up, and the embedded world's sat from end to end on a tiny checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from checkpoints.world import FAMILIES
from evals import cards, curve, scenes
from evals.exam import Item, RecordedAnswer, exactly, make_request, normalise, run, summarise
from evals.official.run import compare
from evals.statistics import wilson
from evals.tasks import open_task
from models.checkpoint import load
from models.manifest import read_manifest, write_manifest
from server.engine import Engine
from server.request import Delta, Failed, Finished, Receipt
from tests.server.tiny import LAYERS, VISUAL, write

RECEIPT = Receipt("strong", "default", 24, 144, 7, 8, 0.25, "fp_1")


def result(family: str, right: str, text: str, receipt: Receipt | None = RECEIPT) -> tuple[Item, RecordedAnswer]:
    answer = RecordedAnswer()
    for piece in text.partition(" "):
        answer(Delta(piece))
    answer(Finished("stop", 10, 2, receipt, {}) if receipt else Failed("broken"))
    return Item(family, "asked", "What is it?", right, exactly(right)), answer


# ---- right and wrong


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Red", "red"), (" red.\n", "red"), ("red .", "red"), ("top left", "top left"), ("A7", "a7"), ("", ""), (".", "")],
)
def test_case_outer_space_and_a_final_period_do_not_matter(answer, expected):
    assert normalise(answer) == expected


@given(st.text("aB. \n", max_size=12))
def test_normalising_twice_changes_nothing(text):
    assert normalise(normalise(text)) == normalise(text)


@given(n=st.integers(1, 5000), data=st.data())
def test_the_interval_holds_the_share_and_stays_in_bounds(n, data):
    right = data.draw(st.integers(0, n))
    low, high = wilson(right, n)
    assert 0 <= low <= round(right / n, 4) + 1e-4
    assert round(right / n, 4) - 1e-4 <= high <= 1
    wrong_low, wrong_high = wilson(n - right, n)
    assert (wrong_low, wrong_high) == pytest.approx((1 - high, 1 - low), abs=2e-4)


def test_intervals_known_from_elsewhere():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    narrow, wide = wilson(900, 1000), wilson(90, 100)
    assert narrow[1] - narrow[0] < wide[1] - wide[0]


# ---- the sum


def test_summary_counts_by_family_and_type_and_failures_as_wrong():
    results = [
        result("shapes", "red", "Red."),
        result("shapes", "red", "blue"),
        result("signs", "A7", "A7"),
        result("signs", "A7", "A7", receipt=None),
    ]
    document = summarise(results, {"task": "scenes", "split": "test"}, "strong", "merging")
    half, quarter = ({"accuracy": 0.5, "interval": wilson(n // 2, n), "n": n} for n in (2, 4))
    assert {name: document[name] for name in quarter} == quarter
    assert (document["failed"], document["different_answers"]) == (1, 2)
    assert document["families"] == {"shapes": half, "signs": half}
    assert document["types"] == {"shapes/asked": half, "signs/asked": half}
    assert (document["visual_tokens"], document["layers"], document["flops_ratio"]) == (24, 7, 0.25)
    assert (document["level"], document["token_policy"], document["split"]) == ("strong", "merging", "test")


def test_questions_about_one_picture_widen_the_interval(directory, monkeypatch):
    results = [result("shapes", "red", text) for text in ("Red.", "red") * 25 + ("blue", "green") * 25]
    for number, (_, answer) in enumerate(results):
        answer.picture = f"picture {number // 2}"
    document = summarise(results, {"task": "names"}, "off", "merging")
    assert document["interval"] == document["families"]["shapes"]["interval"] == pytest.approx(wilson(25, 50), abs=3e-3)
    engine = Engine(load(directory))
    assert cards.card(engine, results, results, 0.1)["agreement_interval"] == wilson(50, 50)
    monkeypatch.setattr(curve, "ask_all", lambda *_: results)
    measured = curve._measure(engine, open_task("scenes", 2), "off", Console(quiet=True))
    assert len({question.picture for question in measured.questions}) == 50


def test_a_question_tells_its_picture(directory):
    engine, answers = Engine(load(directory)), [RecordedAnswer() for _ in range(3)]
    for answer, color in zip(answers, ("red", "red", "blue"), strict=True):
        make_request(engine.preprocessor, 0, Image.new("RGB", (24, 24), color), "What is it?", "off", answer)
    assert answers[0].picture == answers[1].picture != answers[2].picture


def test_a_cards_layers_are_a_mean_as_all_else(directory):
    results = [result("shapes", "red", "Red.", replace(RECEIPT, layers=layers)) for layers in (8, 6, 6)]
    assert cards.card(Engine(load(directory)), results, results, 0.1)["layers"] == 6.7


def test_cards_leave_what_others_wrote_meanwhile(tmp_path, monkeypatch):
    directory = write(tmp_path / "tiny-llava")

    def slow(*_: object) -> float:
        write_manifest(directory, read_manifest(directory).model_copy(update={"name": "renamed"}))
        return 0.1

    monkeypatch.setattr(cards, "_first_token", slow)
    cards.run(directory, partial(open_task, "scenes", 1), "cpu", "float32", quiet=True)
    manifest = read_manifest(directory)
    assert manifest.name == "renamed" and "strong" in manifest.cards


def test_what_failed_at_both_levels_is_no_agreement(directory, monkeypatch):
    failed = [result("shapes", "red", "", receipt=None), result("shapes", "red", "Red.")]
    engine = Engine(load(directory))
    assert cards.card(engine, failed, failed, 0.1)["agreement"] == 0.5
    monkeypatch.setattr(curve, "ask_all", lambda *_: failed)
    measured = curve._measure(engine, open_task("scenes", 2), "off", Console(quiet=True))
    assert measured.texts == [None, "Red."] and compare(measured, measured)["same_answer"] == 0.5


def test_an_exam_repeats_itself_and_takes_all_families_in_turn():
    def sat(count: int, split: str = "test", **options: int) -> list[tuple[bytes, Item]]:
        return [(picture.tobytes(), item) for picture, item in islice(scenes.questions(split, **options), count)]

    first, second = ([(picture, item.text, item.answer) for picture, item in sat(12)] for _ in range(2))
    assert first == second
    assert [item.family for _, item in sat(8)] == [*FAMILIES, *FAMILIES]
    assert [item.text for _, item in sat(12, seed=1)] != [text for _, text, _ in first]
    assert {picture for picture, _ in sat(12, "validation")}.isdisjoint(picture for picture, *_ in first)


# ---- from end to end


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("exam") / "tiny-llava")


@pytest.mark.parametrize("level", ["off", "strong"])
def test_an_exam_on_a_checkpoint_ends_with_one_json_document(directory, capsys, level):
    document = run(directory, open_task("scenes", 6, split="validation"), level, "merging", "cpu", "float32", quiet=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1]) == json.loads(json.dumps(document))
    assert captured.err == ""
    assert (document["n"], document["failed"]) == (6, 0)
    assert document["visual_tokens"] == (VISUAL if level == "off" else 24)
    assert (document["layers"], document["checkpoint"]) == (LAYERS, "tiny-llava")
    assert (document["flops_ratio"] == 1) == (level == "off")


def test_an_exam_for_people_shows_a_table_and_what_went_wrong(directory, capsys):
    run(directory, open_task("scenes", 3), "off", "merging", "cpu", "float32", quiet=False)
    captured = capsys.readouterr()
    assert "scenes: tiny-llava at level off" in captured.err
    assert "not" in captured.err
    assert len(captured.out.splitlines()) == 1


@pytest.mark.parametrize(("level", "policy", "named"), [("most", "merging", "most"), ("off", "psychic", "psychic")])
def test_an_unknown_level_or_policy_is_named_with_what_there_is(directory, level, policy, named):
    with pytest.raises(ValueError, match=rf"'{named}' is not one of \w+, "):
        run(directory, open_task("scenes", 1), level, policy, "cpu", "float32", quiet=True)


def test_cards_say_what_each_level_does_and_stand_on_the_menu(tmp_path):
    directory = write(tmp_path / "tiny-llava")
    found = cards.run(directory, partial(open_task, "scenes", 6, split="validation"), "cpu", "float32", quiet=True)
    engine = Engine(load(directory))
    assert {name: level.card for name, level in engine.menu.items()} == json.loads(json.dumps(found))
    off, strong = found["off"], found["strong"]
    assert (off["task"], off["split"]) == ("scenes", "validation")
    assert (off["agreement"], off["flops_ratio"], off["visual_tokens"], off["n"]) == (1.0, 1.0, VISUAL, 6)
    assert strong["flops_ratio"] < 0.5 and strong["first_token_seconds"] > 0
    text = off["kv_bytes"] / strong["kv_bytes"]
    assert text == pytest.approx((VISUAL + 15) / (24 + 15), rel=0.1), "keys and values are those of the rows that stay"
