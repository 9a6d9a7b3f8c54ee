"""The world of drawings: same seed, same picture; splits apart; and answers that are true of what was drawn."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest

from checkpoints.world import COLORS, FAMILIES, SIZE, SPLITS, WHATS, Mark, Question, Scene, draw, question_types
from checkpoints.world.scene import NUMBERS
from checkpoints.world.shapes import PLACES, SHAPES
from tests.server.tiny import processor

COUNT = 80


@cache
def scenes(family: str, split: str = "validation") -> tuple[Scene, ...]:
    return tuple(draw(split, index, family) for index in range(COUNT))


def asked(family: str, *types: str) -> list[tuple[Scene, Question]]:
    found = [(scene, question) for scene in scenes(family) for question in scene.questions if question.type in types]
    assert len(found) > 10
    return found


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def one_of(names: object, text: str) -> list[str]:
    """The names in a text, in its order; plurals count."""
    singular = {f"{name}s": name for name in names} | {"crosses": "cross"}
    return [singular.get(word, word) for word in words(text) if singular.get(word, word) in names]


def named(scene: Scene, name: str) -> list[Mark]:
    color, shape = name.split()
    return [mark for mark in scene.marks if (mark.color, mark.what) == (color, shape)]


def place(mark: Mark) -> tuple[int, int]:
    """Row and column of three each, by where it was drawn."""
    left, top, right, bottom = mark.box
    return int((top + bottom) / 2 / SIZE * 3), int((left + right) / 2 / SIZE * 3)


# ---- seeds


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_arguments_draw_the_same_picture_and_questions(family):
    for index in range(5):
        first, second = (draw("train", index, family) for _ in range(2))
        assert first.image.tobytes() == second.image.tobytes()
        assert (first.marks, first.questions) == (second.marks, second.questions)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_picture_of_one_split_is_in_another(family):
    pictures = {split: {scene.image.tobytes() for scene in scenes(family, split)} for split in SPLITS}
    assert all(len(found) == COUNT for found in pictures.values()), "and none twice in one"
    assert not pictures["train"] & pictures["validation"]
    assert not pictures["train"] & pictures["test"]
    assert not pictures["validation"] & pictures["test"]


def test_families_take_turns():
    assert [draw("test", index).family for index in range(8)] == [*FAMILIES, *FAMILIES]


@pytest.mark.parametrize(("split", "family"), [("exam", None), ("train", "photographs")])
def test_what_does_not_exist_is_named(split, family):
    with pytest.raises(ValueError, match="exam" if split == "exam" else "photographs"):
        draw(split, 0, family)


# ---- pictures


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_have_one_size_and_show_something(family):
    for scene in scenes(family):
        assert (scene.image.size, scene.image.mode) == ((SIZE, SIZE), "RGB")
        assert scene.marks
        assert np.asarray(scene.image).std() > 5
        for mark in scene.marks:
            assert mark.what in WHATS
            assert mark.color is None or mark.color in COLORS


@pytest.mark.parametrize("family", ["shapes", "charts", "grids"])
def test_things_have_the_color_that_is_told(family):
    """The middle of each mark is nearest to its named color among all."""
    palette = np.array(list(COLORS.values()), float)
    right = []
    for scene in scenes(family):
        pixels = np.asarray(scene.image, float)
        for mark in scene.marks:
            left, top, bottom_right, bottom = mark.box
            if mark.color and bottom - top > 12:
                x, y = int((left + bottom_right) / 2), int((top + bottom) / 2)
                nearest = ((palette - pixels[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))) ** 2).sum(-1).argmin()
                right.append(list(COLORS)[nearest] == mark.color)
    assert len(right) > 100
    assert np.mean(right) > 0.99


# ---- questions


@pytest.mark.parametrize("family", FAMILIES)
def test_every_type_of_question_occurs_in_several_wordings(family):
    texts: dict[str, set[str]] = {}
    for scene in scenes(family):
        types = [question.type for question in scene.questions]
        assert len(types) == len(set(types))
        for question in scene.questions:
            texts.setdefault(question.type, set()).add(question.text)
    assert texts.keys() == set(question_types(family))
    assert all(len(wordings) >= 2 for wordings in texts.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_and_answers_survive_the_tokenizer(family):
    tokenizer = processor().tokenizer
    for scene in scenes(family):
        for question in scene.questions:
            for text in (question.text, question.answer):
                assert text
                assert text == text.strip()
                assert "{" not in text
                assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_is_nearly_always_right(family):
    """A question whose answer can be guessed tests nothing."""
    answers: dict[str, list[str]] = {}
    for scene in scenes(family):
        for question in scene.questions:
            answers.setdefault(question.type, []).append(question.answer)
    for type_, given in answers.items():
        assert max(given.count(answer) for answer in set(given)) < 0.8 * len(given), type_


# ---- answers: shapes


def test_counts_of_shapes_are_what_was_drawn():
    for scene, question in asked("shapes", "count_shape", "count_color", "count_all"):
        if question.type == "count_shape":
            (shape,) = one_of(SHAPES, question.text)
            marks = [mark for mark in scene.marks if mark.what == shape]
        elif question.type == "count_color":
            (color,) = one_of(COLORS, question.text)
            marks = [mark for mark in scene.marks if mark.color == color]
        else:
            marks = scene.marks
        assert question.answer == NUMBERS[len(marks)], question


def test_color_and_shape_are_asked_only_of_what_is_unique():
    for scene, question in asked("shapes", "color", "shape"):
        if question.type == "color":
            (shape,) = one_of(SHAPES, question.text)
            assert [mark.color for mark in scene.marks if mark.what == shape] == [question.answer]
        else:
            (color,) = one_of(COLORS, question.text)
            assert [mark.what for mark in scene.marks if mark.color == color] == [question.answer]


def test_yes_and_no_are_true_of_shapes():
    answers = []
    for scene, question in asked("shapes", "exists"):
        (color,), (shape,) = one_of(COLORS, question.text), one_of(SHAPES, question.text)
        assert question.answer == ("yes" if named(scene, f"{color} {shape}") else "no")
        answers.append(question.answer)
    assert 0.3 < answers.count("yes") / len(answers) < 0.7


def test_places_are_where_things_were_drawn():
    for scene, question in asked("shapes", "where"):
        (color,), (shape,) = one_of(COLORS, question.text), one_of(SHAPES, question.text)
        (mark,) = named(scene, f"{color} {shape}")
        row, column = place(mark)
        assert question.answer == PLACES[row * 3 + column]


def test_relations_are_true():
    for scene, question in asked("shapes", "left_right", "above_below", "larger"):
        pairs = zip(one_of(COLORS, question.text), one_of(SHAPES, question.text), strict=True)
        (a,), (b,) = (named(scene, " ".join(pair)) for pair in pairs)
        (row_a, column_a), (row_b, column_b) = place(a), place(b)
        if question.type == "left_right":
            assert question.answer == ("left" if column_a < column_b else "right")
            assert column_a != column_b
        elif question.type == "above_below":
            assert question.answer == ("above" if row_a < row_b else "below")
            assert row_a != row_b
        else:
            larger, smaller = sorted((a, b), key=lambda mark: mark.box[0] - mark.box[2])
            assert question.answer == f"{larger.color} {larger.what}"
            assert larger.box[2] - larger.box[0] > 1.5 * (smaller.box[2] - smaller.box[0])


def test_lists_and_descriptions_name_every_shape():
    for scene, question in asked("shapes", "list", "describe"):
        expected = [(mark.color, mark.what) for mark in scene.marks]
        assert list(zip(one_of(COLORS, question.answer), one_of(SHAPES, question.answer), strict=True)) == expected


# ---- answers: the other families


def test_signs_say_what_was_written():
    for scene in scenes("signs"):
        answers = {question.type: question.answer for question in scene.questions}
        text = "".join(mark.what for mark in sorted(scene.marks, key=lambda mark: mark.detail) if mark.detail)
        assert answers["read"] == text
        assert (answers["first"], answers["last"]) == (text[0], text[-1])
        assert answers["count_characters"] == NUMBERS[len(text)]
        assert answers["has_digit"] == ("yes" if re.search("[0-9]", text) else "no")
        assert answers["sign_color"] == scene.marks[0].color
        assert answers["describe"].endswith(f"{scene.marks[0].color} sign that says {text}.")


def test_charts_are_as_tall_as_told():
    for scene in scenes("charts"):
        heights = {mark.color: round((mark.box[3] - mark.box[1]) / 10) for mark in scene.marks}
        order = sorted(heights, key=heights.__getitem__)
        for question in scene.questions:
            colors = one_of(COLORS, question.text)
            if question.type == "tallest":
                assert question.answer == order[-1]
            elif question.type == "shortest":
                assert question.answer == order[0]
            elif question.type == "height":
                assert question.answer == NUMBERS[heights[colors[0]]]
            elif question.type == "count_bars":
                assert question.answer == NUMBERS[len(heights)]
            elif question.type == "exists":
                assert question.answer == ("yes" if colors[0] in heights else "no")
            elif question.type == "taller":
                assert question.answer == ("yes" if heights[colors[0]] > heights[colors[1]] else "no")
            elif question.type == "list":
                assert question.answer == ", ".join(f"{color} {NUMBERS[height]}" for color, height in heights.items())


def test_boards_hold_what_is_told():
    numbers = [str(n) for n in range(1, 5)]
    for scene in scenes("grids"):
        side = round(len(scene.marks) ** 0.5)
        board = [[scene.marks[row * side + column].color for column in range(side)] for row in range(side)]
        cells = [cell for row in board for cell in row]
        for question in scene.questions:
            digits = [NUMBERS.index(w) if w in NUMBERS else int(w) for w in one_of([*NUMBERS[1:5], *numbers], question.text)]
            colors = one_of(COLORS, question.text)
            if question.type == "cell":
                row, column = digits if question.text.index("row") < question.text.index("column") else digits[::-1]
                assert question.answer == (board[row - 1][column - 1] or "nothing")
            elif question.type == "row":
                assert question.answer == ", ".join(cell or "nothing" for cell in board[digits[0] - 1])
            elif question.type == "count_filled":
                assert question.answer == NUMBERS[sum(cell is not None for cell in cells)]
            elif question.type == "count_empty":
                assert question.answer == NUMBERS[cells.count(None)]
            elif question.type == "count_color":
                assert question.answer == NUMBERS[cells.count(colors[0])]
            elif question.type == "exists":
                assert question.answer == ("yes" if colors[0] in cells else "no")
            elif question.type == "rows":
                assert question.answer == NUMBERS[side]


@pytest.mark.parametrize("family", FAMILIES)
def test_drills_agree_with_the_questions(family):
    """What a drill says of a color, a shape or a pair is what the question of its type answers, where the two meet."""
    met = 0
    for index in range(60):
        scene = draw("train", index, family)
        for drill, question in ((d, q) for d in scene.drills for q in scene.questions if d.type == q.type):
            for wanted, found in drill.pairs:
                words = wanted.split()
                if len(words) <= 2 and all(f" {word} " in question.text.replace("?", " ").replace(".", " ") for word in words):
                    if family == "shapes" and question.type in ("left_right", "above_below", "larger"):
                        continue
                    if question.type != "taller":
                        assert found == question.answer, (question, drill)
                        met += 1
    assert met > 10 or family == "signs"
