"""Each official format: hand-made files, a model's answers, and the score that the official rules give."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import get_args

import openpyxl
import pytest
from rich.console import Console

from espalier import OfficialTask
from evals.official import choices, yes_no
from evals.official.ask import Answer, Ask
from evals.official.run import Measured, run
from evals.official.task import Question, sample
from evals.official.tasks import TASKS
from evals.official.vqa_accuracy import agreement, normalise, prepare
from tests.evals.official.data import CASES

QUIET = Console(quiet=True)


def says(answers: Iterable[str]) -> Ask:
    """A model that gives these answers in turn."""
    left = iter(answers)

    def ask(questions: Iterable[Question], max_tokens: int) -> Iterator[tuple[Question, Answer]]:
        for question in questions:
            yield question, Answer(next(left), {"visual_tokens": 10, "visual_tokens_total": 20, "layers": 3, "flops_ratio": 0.5})

    return ask


def measure(name: str, folder: Path, answers: list[str] | None = None, split: str | None = None) -> Measured:
    case, task = CASES[name], TASKS[name]
    case.write(folder / "data")
    questions = task.read(folder / "data", split or case.split)
    about = {"task": name, "model": "tiny", "level": "off"}
    return run(task, questions, folder / "data", says(answers or case.answers), about, folder / "run", None, QUIET)


def test_every_task_has_a_case_and_a_name_in_the_command():
    assert set(CASES) == set(TASKS) == set(get_args(OfficialTask))


@pytest.mark.parametrize("name", CASES)
def test_hand_made_files_score_as_the_official_rules_say(name, tmp_path):
    case, measured = CASES[name], measure(name, tmp_path)
    assert [question.text for question in measured.questions][: len(case.prompts)] == case.prompts
    if not case.scores:
        assert measured.scores is None and "accuracy" not in measured.document
        return
    assert measured.scores == pytest.approx(case.scores)
    document = measured.document
    assert document["accuracy"] == pytest.approx(sum(case.scores) / len(case.scores), abs=1e-4)
    assert {group: document["groups"][group]["accuracy"] for group in case.groups} == pytest.approx(case.groups, abs=1e-4)
    assert {figure: document["figures"][figure] for figure in case.figures} == pytest.approx(case.figures, abs=1e-4)
    assert (document["visual_tokens"], document["visual_tokens_total"], document["flops_ratio"]) == (10, 20, 0.5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.files])
def test_files_are_those_that_the_official_server_reads(name, tmp_path):
    measure(name, tmp_path)
    for file, expected in CASES[name].files.items():
        text = (tmp_path / "run" / file).read_text()
        found = text if isinstance(expected, str) else json.loads(text)
        assert (found[: len(expected)] if isinstance(expected, list) else found) == expected


@pytest.mark.parametrize("name", CASES)
def test_answers_are_in_llavas_own_format_and_order(name, tmp_path):
    measured = measure(name, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    assert [(line["question_id"], line["prompt"]) for line in lines] == [question.key for question in measured.questions]
    assert [line["text"] for line in lines] == CASES[name].answers
    assert all(line["model_id"] == "tiny" and line["answer_id"] for line in lines)
    assert len({line["answer_id"] for line in lines}) == len(lines)


# ---- what is special in one of them


def test_mmbench_is_submitted_as_a_table(tmp_path):
    measure("mmbench", tmp_path)
    head, first, *_ = openpyxl.load_workbook(BytesIO((tmp_path / "run/upload.xlsx").read_bytes())).active.values
    assert head == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert first == (7, "Which\nis it?", "red", "blue", "green", "grey", "B", "B", "dev")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", None), ("(B)", "B"), ("B.", "B"), ("Answer: C", "C"), ("E", None), ("", None),
        ("A or B", None), ("A", "A"), ("A dog sits here", "A"), ("A dog sits here on my mat", "B"),
        ("the DOG", None), ("a dog", "B"), ("a cat and a dog", None),
        ("It is B because of the long and winding story of it", None), ("a dog " * 20, None),
    ],
)  # fmt: skip
def test_a_choice_is_read_by_letter_or_by_text(answer, letter):
    assert choices.infer(answer, ["a cat", "a dog", "a bird"]) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [("A", "A"), ("AB", None), ("B. no", "B"), ("B.no", None), ("The answer is D.", "D"), ("", None), ("b", None),
     ("The answer is A. The answer is B.", None), ("Answer: A", None)],
)  # fmt: skip
def test_scienceqas_letter_is_read_as_llava_reads_it(answer, letter):
    assert choices.chosen(answer) == letter


@pytest.mark.parametrize(
    ("answer", "label"), [("no", "no"), ("nothing", "yes"), ("Not here", "yes"), ("it is not, no", "no"), ("", "yes")]
)
def test_popes_yes_is_whatever_does_not_say_no(answer, label):
    assert yes_no.said(answer) == label


@pytest.mark.parametrize(
    ("answer", "label"), [("YES!", "yes"), ("know", "no"), ("I do not", "other"), ("", "other"), ("a yes", "other")]
)
def test_mmes_answer_is_in_four_characters(answer, label):
    assert yes_no.meant(answer) == label


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The two dogs", "2 dogs"), ("None.", "0"), ("a", ""), ("Ten o clock", "10 o clock"), ("oclock", "o'clock"), ("2.5", "2.5"),
        ("2. 5", "2 5"), ("1,000,000", "1000000"), ("red/blue", "red blue"), ("red / blue", "red blue"),
        ("(no)", "no"), ("yall'll", "y'all'll"),
        ("somebody'd", "somebodyd"), ("Hello\nworld", "hello world"), ("don't", "don't"), ("dont", "don't"),
    ],
)  # fmt: skip
def test_answers_are_normalised_as_vqas_server_does(text, plain):
    assert normalise(text) == " ".join(plain.split())


def test_llava_prepares_answers_before_they_are_normalised():
    assert [prepare(text) for text in ("Joe's", "Red, green", "What?", "A, B")] == ["joe 's", "red green", "what", "b"]


@pytest.mark.parametrize("same", range(11))
def test_agreement_is_the_mean_over_leaving_one_person_out(same):
    answers = ["x"] * same + ["y"] * (10 - same)
    each = [min(1, sum(other == "x" for j, other in enumerate(answers) if j != i) / 3) for i in range(10)]
    assert agreement("x", answers) == pytest.approx(sum(each) / 10)


def test_splits_without_answers_are_written_and_not_scored(tmp_path):
    CASES["vqav2"].write(tmp_path / "data")
    questions = json.loads((tmp_path / "data/v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    path = tmp_path / "data/v2_OpenEnded_mscoco_test-dev2015_questions.json"
    path.write_text(json.dumps(questions | {"data_subtype": "test-dev2015"}))
    (tmp_path / "data/val2014").rename(tmp_path / "data/test2015")
    for image in (tmp_path / "data/test2015").iterdir():
        image.rename(image.with_name(image.name.replace("val2014", "test2015")))
    task = TASKS["vqav2"]
    read = task.read(tmp_path / "data", "test-dev")
    about = {"task": "vqav2", "model": "tiny", "level": "off"}
    measured = run(task, read, tmp_path / "data", says(CASES["vqav2"].answers), about, tmp_path / "run", None, QUIET)
    assert measured.scores is None and "accuracy" not in measured.document
    assert json.loads((tmp_path / "run/upload.json").read_text())[4] == {"question_id": 14, "answer": "2"}


def test_mmbenchs_test_split_is_submitted_and_not_scored(tmp_path):
    CASES["mmbench"].write(tmp_path / "data")
    table = tmp_path / "data/mmbench_dev.tsv"
    table.write_text(table.read_text().replace("\tanswer\t", "\tanother\t"))
    task, about = TASKS["mmbench"], {"task": "mmbench", "model": "tiny", "level": "off"}
    questions = task.read(tmp_path / "data", None)
    measured = run(task, questions, tmp_path / "data", says(CASES["mmbench"].answers), about, tmp_path / "run", None, QUIET)
    assert measured.scores is None and (tmp_path / "run/upload.xlsx").exists()


def test_one_category_can_be_asked(tmp_path):
    assert len(measure("pope", tmp_path / "pope", ["No", "Yes"], split="popular").questions) == 2
    assert len(measure("mme", tmp_path / "mme", ["No"] * 4, split="count").questions) == 4


def test_a_sample_takes_whole_pictures_and_grows(tmp_path):
    CASES["mme"].write(tmp_path)
    questions = TASKS["mme"].read(tmp_path, None)
    three, six = sample(questions, 3), sample(questions, 6)
    assert len(three) == 4 and len({question.image for question in three}) == 2
    assert len(six) == 6 and {question.key for question in three} <= {question.key for question in six}
    assert six == [question for question in questions if question in six]
    assert sample(questions, None) == sample(questions, 100) == questions
