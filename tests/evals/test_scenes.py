"""The exam: what counts as right, how it is summed up, and one sat from end to end on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.world import FAMILIES, Question, Scene, draw
from evals import cards
from evals.scenes import RecordedAnswer, exam, normalise, run, summarise
from evals.statistics import wilson
from models.checkpoint import load
from server.engine import Engine
from server.request import Delta, Failed, Finished, Receipt
from tests.server.tiny import LAYERS, VISUAL, write

RECEIPT = Receipt("strong", "default", 24, 144, 7, 8, 0.25, "fp_1")


def result(
    scene: Scene, question: Question, text: str, receipt: Receipt | None = RECEIPT
) -> tuple[Scene, Question, RecordedAnswer]:
    answer = RecordedAnswer()
    for piece in text.partition(" "):
        answer(Delta(piece))
    answer(Finished("stop", 10, 2, receipt, {}) if receipt else Failed("broken"))
    return scene, question, answer


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
    shapes, signs = draw("test", 0), draw("test", 1)
    color, read = Question("color", "What color is the star?", "red"), Question("read", "Read the sign.", "A7")
    results = [
        result(shapes, color, "Red."),
        result(shapes, color, "blue"),
        result(signs, read, "A7"),
        result(signs, read, "A", receipt=None),
    ]
    document = summarise(results, "strong", "test", "merging")
    assert (document["accuracy"], document["n"], document["failed"]) == (0.5, 4, 1)
    assert document["interval"] == wilson(2, 4)
    assert document["families"] == {"shapes": 0.5, "signs": 0.5}
    assert document["types"] == {"shapes/color": {"accuracy": 0.5, "n": 2}, "signs/read": {"accuracy": 0.5, "n": 2}}
    assert (document["visual_tokens"], document["layers"], document["flops_ratio"]) == (24, 7, 0.25)
    assert (document["level"], document["token_policy"], document["split"]) == ("strong", "merging", "test")


def test_an_exam_repeats_itself_and_takes_all_families_in_turn():
    first, second = ([(s.image.tobytes(), q) for s, q in exam("test", 12)] for _ in range(2))
    assert first == second
    assert [scene.family for scene, _ in exam("test", 8)] == [*FAMILIES, *FAMILIES]
    assert [q for _, q in exam("test", 12, seed=1)] != [q for _, q in first]
    assert {s.image.tobytes() for s, _ in exam("validation", 12)}.isdisjoint(image for image, _ in first)


# ---- from end to end


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("exam") / "tiny-llava")


@pytest.mark.parametrize("level", ["off", "strong"])
def test_an_exam_on_a_checkpoint_ends_with_one_json_document(directory, capsys, level):
    document = run(directory, level, 6, "validation", "merging", "cpu", "float32", quiet=True)
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1]) == json.loads(json.dumps(document))
    assert captured.err == ""
    assert (document["n"], document["failed"]) == (6, 0)
    assert document["visual_tokens"] == (VISUAL if level == "off" else 24)
    assert (document["layers"], document["checkpoint"]) == (LAYERS, "tiny-llava")
    assert (document["flops_ratio"] == 1) == (level == "off")


def test_an_exam_for_people_shows_a_table_and_what_went_wrong(directory, capsys):
    run(directory, "off", 3, "validation", "merging", "cpu", "float32", quiet=False)
    captured = capsys.readouterr()
    assert "tiny-llava at level off" in captured.err
    assert "not" in captured.err
    assert len(captured.out.splitlines()) == 1


@pytest.mark.parametrize(("level", "policy", "named"), [("most", "merging", "most"), ("off", "psychic", "psychic")])
def test_an_unknown_level_or_policy_is_named_with_what_there_is(directory, level, policy, named):
    with pytest.raises(ValueError, match=rf"'{named}' is not one of \w+, "):
        run(directory, level, 1, "test", policy, "cpu", "float32", quiet=True)


def test_cards_say_what_each_level_does_and_stand_on_the_menu(tmp_path):
    directory = write(tmp_path / "tiny-llava")
    found = cards.run(directory, 6, "validation", "cpu", "float32", quiet=True)
    engine = Engine(load(directory))
    assert {name: level.card for name, level in engine.menu.items()} == json.loads(json.dumps(found))
    off, strong = found["off"], found["strong"]
    assert (off["agreement"], off["flops_ratio"], off["visual_tokens"], off["n"]) == (1.0, 1.0, VISUAL, 6)
    assert strong["flops_ratio"] < 0.5 and strong["first_token_seconds"] > 0
    text = off["kv_bytes"] / strong["kv_bytes"]
    assert text == pytest.approx((VISUAL + 15) / (24 + 15), rel=0.1), "keys and values are those of the rows that stay"
