"""Runs: through the engine and over HTTP, stopped and gone on with, judged, compared, and told off for bad data."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from rich.console import Console
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from espalier import app, eval_
from evals import command
from evals.command import Options
from evals.exam import open_engine
from evals.official import ask, judge, likelihood
from evals.official.ask import Answer, Ask
from evals.official.judge import Judge
from evals.official.judged import score_pair
from evals.official.own import OWN, read_own, with_dense
from evals.official.run import compare, reopen, run
from evals.official.task import DataError, Question, check_pictures
from evals.official.tasks import TASKS
from evals.statistics import clustered_error, difference_interval, interval, wilson
from models.manifest import Calibration, read_manifest, write_manifest
from server.engine import Engine
from server.errors import Overloaded
from server.request import Failed
from tests.evals.official.data import CASES, picture, put
from tests.evals.official.test_formats import measure, says
from tests.server.client import app_of
from tests.server.fake_engine import FakeEngine
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # fixture
from tests.server.tiny import write

QUIET = Console(quiet=True)


@pytest.fixture(name="checkpoint", scope="session")
def checkpoint_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("eval") / "tiny-llava")


def evaluate(*options: object) -> tuple[dict[str, Any], str]:
    """The command's last line, and all that it said."""
    result = CliRunner().invoke(app, ["eval", *map(str, options)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1]), result.output


def refused(*options: object) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, options)])
    assert result.exit_code == 1 and "Traceback" not in result.output, result.output
    return result.output


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- through the engine


def test_a_task_runs_through_the_engine_with_receipts(checkpoint, tmp_path):
    CASES["scienceqa"].write(tmp_path / "data")
    given = (checkpoint, "--task", "scienceqa", "--data", tmp_path / "data", "--level", "strong", "--out", tmp_path / "runs")
    document, shown = evaluate(*given)
    assert (document["task"], document["n"], document["level"], document["refused"]) == ("scienceqa", 5, "strong", 0)
    assert 0 < document["flops_ratio"] < 1 and document["seconds_per_question"] > 0
    assert "without context" in shown and "of the FLOPs" in shown
    folder = tmp_path / "runs/scienceqa/tiny-llava@strong"
    with_picture, *others = [line["metadata"] for line in lines(folder / "answers.jsonl")]
    assert with_picture["visual_tokens"] < with_picture["visual_tokens_total"] == 144
    assert {one["visual_tokens_total"] for one in others} == {0}  # questions without a picture
    assert json.loads((folder / "scores.json").read_text()) == document


def test_a_run_that_was_stopped_asks_only_what_is_missing(checkpoint, tmp_path, monkeypatch):
    CASES["pope"].write(tmp_path / "data")
    given = (checkpoint, "--task", "pope", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--at-once", 2, "--json")
    whole, _ = evaluate(*given)
    path = tmp_path / "runs/pope/tiny-llava@off/answers.jsonl"
    before = path.read_text()
    path.write_text(before[: before.index("\n", 900) + 40])  # cut in the middle of a line
    kept = path.read_text().count("\n")
    submitted: list[str] = []
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", lambda engine, request: (submitted.append(request.id), submit(engine, request))[1])
    again, _ = evaluate(*given)
    assert 0 < kept < 6 and len(submitted) == 6 - kept
    assert [line["text"] for line in lines(path)] == [json.loads(line)["text"] for line in before.splitlines()]
    assert {**again, "seconds_per_question": 0} == {**whole, "seconds_per_question": 0}


def test_a_write_that_is_cut_short_leaves_the_folder_whole(tmp_path, monkeypatch):
    CASES["gqa"].write(tmp_path / "data")
    questions, about = TASKS["gqa"].read(tmp_path / "data", None), {"task": "gqa", "model": "m", "level": "off"}
    given = (TASKS["gqa"], questions, tmp_path / "data", says(["yes"] * 3), about, tmp_path / "run", None, QUIET)

    def cut(path: Path, content: str | bytes, *_: object) -> None:
        with path.open("wb") as file:
            file.write((content.encode() if isinstance(content, str) else content)[:9])
        raise KeyboardInterrupt

    for _ in range(2):  # as it is begun, and as it goes on
        with monkeypatch.context() as power:
            power.setattr(Path, "write_text", cut)
            power.setattr(Path, "write_bytes", cut)
            with pytest.raises(KeyboardInterrupt):
                run(*given)
        assert run(*given).texts == ["yes"] * 3


def test_a_larger_limit_goes_on_and_a_smaller_one_loses_nothing(checkpoint, tmp_path):
    CASES["mme"].write(tmp_path / "data")
    given = (checkpoint, "--task", "mme", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--json")
    sizes = [evaluate(*given, "--limit", limit)[0]["n"] for limit in (2, 6, 2)]
    assert sizes == [2, 6, 2]
    assert len(lines(tmp_path / "runs/mme/tiny-llava@off/answers.jsonl")) == 6


def test_questions_that_fail_are_asked_again(tmp_path):
    CASES["gqa"].write(tmp_path / "data")
    questions, about = TASKS["gqa"].read(tmp_path / "data", None), {"task": "gqa", "model": "m", "level": "off"}

    def flaky(asked, max_tokens):
        for number, question in enumerate(asked):
            yield question, Answer("", failed="out of luck") if number == 1 else Answer("yes")

    with pytest.raises(ValueError, match=r"1 of 3 questions .* first .*questions.json, entry '102': out of luck; .* kept"):
        run(TASKS["gqa"], questions, tmp_path / "data", flaky, about, tmp_path / "run", None, QUIET)
    assert [line["question_id"] for line in lines(tmp_path / "run/answers.jsonl")] == ["101", "103"]
    measured = run(TASKS["gqa"], questions, tmp_path / "data", says(["red"]), about, tmp_path / "run", None, QUIET)
    assert measured.texts == ["yes", "red", "yes"] and measured.scores == [1, 1, 0]


def test_what_does_not_fit_the_context_counts_as_wrong(checkpoint, tmp_path):
    write_own(tmp_path, "one " * 2000)
    document, shown = evaluate(checkpoint, "--data", tmp_path / "own.jsonl", "--level", "strong", "--out", tmp_path / "runs")
    assert document["refused"] == 1 and "1 questions do not fit the context" in shown


def refuses(questions: Iterable[Question], max_tokens: int) -> Iterator[tuple[Question, Answer]]:
    yield from ((question, Answer("", refused="too long")) for question in questions)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.scores])
def test_what_is_refused_is_wrong_in_every_figure(name, tmp_path):
    CASES[name].write(tmp_path / "data")
    questions, about = TASKS[name].read(tmp_path / "data", None), {"task": name, "model": "m", "level": "off"}
    measured = run(TASKS[name], questions, tmp_path / "data", refuses, about, tmp_path / "run", None, QUIET)
    document = measured.document
    assert (document["accuracy"], document["refused"]) == (0, len(questions))
    assert not any(document["figures"].values()) and not any(one["accuracy"] for one in document["groups"].values())
    again = compare(measured, reopen(TASKS[name], tmp_path / "run", questions))
    assert (again["same_answer"], again["difference"]) == (0, 0)


def test_what_both_models_refuse_is_no_agreement(tmp_path):
    write_own(tmp_path, "What color is it?")
    questions, about = with_dense(read_own(tmp_path / "own.jsonl"), [None]), {"task": "own", "model": "m", "level": "strong"}
    measured = run(OWN, questions, tmp_path, refuses, about, tmp_path / "run", None, QUIET)
    assert (measured.scores, measured.document["accuracy"], measured.document["figures"]["right"]) == ([0], 0, 0)


def test_another_run_is_not_mixed_with_this_one(checkpoint, tmp_path):
    CASES["gqa"].write(tmp_path / "data")
    given = (checkpoint, "--task", "gqa", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--level", "strong")
    evaluate(*given)
    assert "holds a run whose dtype is 'float32', not 'bfloat16'" in refused(*given, "--dtype", "bfloat16")
    path = tmp_path / "data/testdev_balanced_questions.json"
    path.write_text(path.read_text().replace("Is it red?", "Is it blue?"))
    assert "holds a run whose data is " in refused(*given)


def test_a_run_is_another_when_its_level_runs_something_else(tmp_path):
    checkpoint = write(tmp_path / "deep", layers=16)
    write_own(tmp_path, "What color is it?")
    given = (checkpoint, "--data", tmp_path / "own.jsonl", "--level", "strong", "--out", tmp_path / "runs", "--json")
    evaluate(*given)
    manifest = read_manifest(checkpoint)
    write_manifest(checkpoint, manifest.model_copy(update={"cards": {"strong": {"accuracy": 0.5}}}))
    evaluate(*given)  # a card says what was measured, and changes nothing
    other = Calibration(layer_change=[1 - n / 16 for n in range(16)], data="x", samples=1, seed=0)
    for changed, told in (
        ({"patch_ratio": {"strong": 0.25}}, "patch_ratio is 1.0, not 0.25"),
        ({"calibration": other}, "skipped_layers is [[1]], not [[14]]"),
        ({"calibration": None}, "operating_points is"),
    ):
        write_manifest(checkpoint, manifest.model_copy(update=changed))
        assert f"holds a run whose {told}" in refused(*given)


# ---- levels side by side


def test_levels_are_compared_and_drawn(checkpoint, tmp_path):
    CASES["vqav2"].write(tmp_path / "data")
    document, shown = evaluate(
        checkpoint, "--task", "vqav2", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--compare", "off,strong",
        "--picture", tmp_path / "curve.png",
    )  # fmt: skip
    assert list(document["levels"]) == ["off", "strong"]
    assert document["levels"]["strong"]["flops_ratio"] < document["levels"]["off"]["flops_ratio"] == 1
    assert document["changes"][0]["against"] == "tiny-llava at off" and "against tiny-llava at off, 13 questions" in shown
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_levels_of_a_drawn_task_are_compared_too(checkpoint, tmp_path):
    document, _ = evaluate(checkpoint, "--limit", 3, "--compare", "off,strong", "--picture", tmp_path / "curve.svg", "--json")
    assert document["task"] == "scenes" and [one["n"] for one in document["levels"].values()] == [3, 3]
    assert document["changes"][0]["n"] == 3 and "<svg" in (tmp_path / "curve.svg").read_text()


def test_two_runs_are_compared_question_by_question(tmp_path):
    before = measure("pope", tmp_path, CASES["pope"].answers)
    questions = before.questions
    about = {"task": "pope", "model": "tiny", "level": "strong"}
    ours = run(TASKS["pope"], questions, tmp_path / "data", says(["No"] * 6), about, tmp_path / "b", None, QUIET)
    change = compare(ours, reopen(TASKS["pope"], tmp_path / "run", questions))
    assert (change["against"], change["n"], change["same_answer"]) == ("tiny at off", 6, round(1 / 6, 4))
    assert (change["better"], change["worse"], change["difference"]) == (2, 1, round(1 / 6, 4))
    assert [(one["question_id"], one["gain"]) for one in change["changed"]] == [("popular/2", 1), ("random/1", -1), ("random/4", 1)]
    assert change["interval"] == (-1, 1)  # all are about one picture
    with pytest.raises(DataError, match="is no run"):
        reopen(TASKS["pope"], tmp_path / "nowhere", questions)


def test_against_names_another_run(checkpoint, tmp_path):
    CASES["gqa"].write(tmp_path / "data")
    given = (checkpoint, "--task", "gqa", "--data", tmp_path / "data", "--out", tmp_path / "runs")
    evaluate(*given)
    document, _ = evaluate(*given, "--level", "strong", "--against", tmp_path / "runs/gqa/tiny-llava@off")
    [change] = document["changes"]
    changed = lines(tmp_path / "runs/gqa/tiny-llava@strong/changes.jsonl")
    assert change["n"] == 3 and len(changed) == change["better"] + change["worse"]


# ---- a user's own questions


def write_own(folder: Path, *questions: str) -> None:
    put(folder / "a.png", picture())
    put(folder / "own.jsonl", [{"image": "a.png", "question": text, "answer": "red"} for text in questions])


def test_own_questions_tell_how_often_dense_is_agreed_with(checkpoint, tmp_path):
    write_own(tmp_path, "What color is it?", "Is it red?", "How many?")
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A square."}]
    put(tmp_path / "own.jsonl", [*lines(tmp_path / "own.jsonl"), {"image": "a.png", "conversations": talk}])
    given = (checkpoint, "--data", tmp_path / "own.jsonl", "--out", tmp_path / "runs")
    document, _ = evaluate(*given, "--compare", "off,strong")
    off, strong = document["levels"].values()
    assert (off["measure"], off["n"], off["accuracy"]) == ("agreement with dense", 4, 1.0)
    assert strong["accuracy"] == document["changes"][1]["same_answer"]
    assert set(strong["figures"]) == {"right", "right, dense", "perplexity of dense answers"}
    assert 1 <= off["figures"]["perplexity of dense answers"] != strong["figures"]["perplexity of dense answers"]
    assert "name a --level, or the dense checkpoint --against" in refused(*given)
    against_itself, _ = evaluate(*given, "--level", "off", "--against", checkpoint)
    assert against_itself["accuracy"] == 1.0


@pytest.mark.parametrize("asked", [{"question": "How many?", "answer": 3}, {"conversations": [{"value": 3}, {"value": "red"}]}])
def test_an_own_row_that_is_no_text_is_named(asked, tmp_path):
    put(tmp_path / "own.jsonl", [{"image": "a.png"} | asked])
    with pytest.raises(DataError, match="questions and answers must be strings"):
        read_own(tmp_path / "own.jsonl")


def test_the_likelihood_of_an_answer_is_what_transformers_says(checkpoint, tmp_path):
    write_own(tmp_path, "What color is it?")
    [question] = read_own(tmp_path / "own.jsonl")
    engine = open_engine(checkpoint, ["off"], None, "cpu", "float32")
    found, count = likelihood.through_engine(engine, "off")(question, "a red square")
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "a red square"}]}]
    ids = torch.tensor([engine.preprocessor.prompt(turns, generation=False, continued=True)])
    start = len(engine.preprocessor.prompt(turns[:1]))
    pixels = engine.preprocessor.picture(ask.decode_picture(question)).pixels
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0]
    expected = logits[start - 1 : -1].log_softmax(-1).gather(1, ids[0, start:, None])
    assert count == ids.shape[1] - start > 0
    assert found == pytest.approx(float(expected.sum()), rel=1e-4)
    assert likelihood.through_engine(engine, "off")(question, "") == (0.0, 0)


def test_likelihood_is_of_what_the_levels_tower_sees(checkpoint, tmp_path, monkeypatch):
    write_own(tmp_path, "What color is it?")
    merging = Path(shutil.copytree(checkpoint, tmp_path / "merging"))
    write_manifest(merging, read_manifest(merging).model_copy(update={"patch_ratio": {"strong": 0.25}}))
    engine = open_engine(merging, ["off"], None, "cpu", "float32")
    ratios, encode = [], engine.model.encode

    def recorded(pixels: Any, layout: Any, ratio: float = 1.0) -> Any:
        ratios.append(ratio)
        return encode(pixels, layout, ratio)

    monkeypatch.setattr(engine.model, "encode", recorded)
    for level in ("off", "strong"):
        likelihood.through_engine(engine, level)(*read_own(tmp_path / "own.jsonl"), "red")
    assert ratios == [1.0, 0.25]


# ---- over HTTP


@pytest.fixture(name="served")
def served_engine() -> Iterator[tuple[str, FakeEngine]]:
    engine = FakeEngine()
    server = uvicorn.Server(uvicorn.Config(app_of(engine), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield "http://{}:{}".format(*listener.getsockname()), engine
        server.should_exit = True
        engine.release.set()
        thread.join()


def test_a_task_runs_over_http_at_a_level(served, tmp_path):
    url, _ = served
    CASES["gqa"].write(tmp_path / "data")
    given = ("--task", "gqa", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--url", url, "--level", "strong")
    document, _ = evaluate(*given)
    assert (document["model"], document["n"]) == ("fake-llava", 3)
    stored = lines(tmp_path / "runs/gqa/fake-llava@strong/answers.jsonl")
    assert {line["text"] for line in stored} == {"A red star."}
    assert {line["metadata"]["level"] for line in stored} == {"strong"}
    assert "Unknown pruning level" in refused(*given[:-1], "none", "--out", tmp_path / "others")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda engine: setattr(engine, "fingerprint", "fp_other"), "fingerprint is 'fp_fake', not 'fp_other'"),
        (lambda engine: engine.menu.update(strong=replace(engine.menu["strong"], patch_ratio=0.5)), "patch_ratio is 1.0, not 0.5"),
    ],
)
def test_a_server_that_serves_something_else_is_another_run(served, tmp_path, change, told):
    url, engine = served
    CASES["gqa"].write(tmp_path / "data")
    given = ("--task", "gqa", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--url", url, "--level", "strong")
    evaluate(*given)
    change(engine)
    assert f"holds a run whose {told}" in refused(*given)


def test_an_overloaded_server_is_waited_for(served, tmp_path, monkeypatch):
    url, engine = served
    monkeypatch.setattr(ask.time, "sleep", lambda seconds: None)
    engine.refusals = [Overloaded("full", 1), Overloaded("full", 1), None, None, None]
    CASES["gqa"].write(tmp_path / "data")
    document, _ = evaluate("--task", "gqa", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--url", url)
    assert document["n"] == 3


def test_what_the_server_fails_on_is_named_and_asked_again(served, tmp_path):
    url, engine = served
    engine.failure = Failed("broken")
    CASES["gqa"].write(tmp_path / "data")
    given = ("--task", "gqa", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--url", url)
    assert "3 of 3 questions were not answered, first" in refused(*given)
    engine.failure = None
    assert evaluate(*given)[0]["n"] == 3


def test_a_server_of_another_kind_is_named(verdicts, tmp_path):
    CASES["gqa"].write(tmp_path)
    url = verdicts[1].url.removesuffix("/v1")
    assert "answers what no OpenAI-compatible server does: '[]'" in refused("--task", "gqa", "--data", tmp_path, "--url", url)


def test_no_server_is_said_and_no_url_too(tmp_path):
    CASES["gqa"].write(tmp_path / "data")
    given = ("--task", "gqa", "--data", tmp_path / "data", "--url")
    assert "no server answers at http://127.0.0.1:9 " in refused(*given, "http://127.0.0.1:9")
    assert "'localhost' is no URL" in refused(*given, "localhost")
    assert "has no --token-policy" in refused(*given, "http://127.0.0.1:9", "--token-policy", "merging")


# ---- judges


class Verdicts(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge that says what it is told to; a number is a status to fail with."""

    says: list[str | int]
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        said = self.says.pop(0)
        reply = {"choices": [{"message": {"content": said}}]} if isinstance(said, str) else {"error": {"message": "no more"}}
        content = b"<html>" if said == "HTML" else json.dumps(reply).encode()
        self.send_response(200 if isinstance(said, str) else said)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(name="verdicts")
def judging_server(monkeypatch) -> Iterator[tuple[type[Verdicts], Judge]]:
    monkeypatch.setattr(judge, "WAIT_S", 0.0)
    handler = type("Handler", (Verdicts,), {"says": [], "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield handler, Judge(f"http://127.0.0.1:{server.server_address[1]}/v1", "judge-1")
        server.shutdown()


def judged(name: str, folder: Path, by: Judge, ask: Ask | None = None):
    CASES[name].write(folder / "data")
    task, about = TASKS[name], {"task": name, "model": "tiny", "level": "off"}
    questions = task.read(folder / "data", None)
    return run(task, questions, folder / "data", ask or says(CASES[name].answers), about, folder / "run", by, QUIET)


def test_mm_vet_is_judged_with_its_own_prompt(verdicts, tmp_path):
    server, by = verdicts
    server.says += ["0.5", "good", "2", "1.0 and"]  # twice no number from 0 to 1: asked again
    document = judged("mmvet", tmp_path, by).document
    assert document["figures"] == {"total": 75.0, "judge": "judge-1"}
    assert {name: one["accuracy"] for name, one in document["groups"].items()} == {"math": 0.5, "ocr": 0.5, "rec": 1.0}
    first, second, third, _ = server.asked
    assert first["messages"][0]["content"] == "Give marks.\n\nWhat is x? | -1 <AND> -5 | x = -1 | "
    assert (first["max_tokens"], first["temperature"], first["model"]) == (3, 0.0, "judge-1")
    assert third["messages"][0]["content"].startswith(second["messages"][0]["content"] + "\n") and third["temperature"] == 0.0


@pytest.mark.parametrize("name", ["mmvet", "llava-bench"])
def test_no_judge_makes_a_refusal_right(name, verdicts, tmp_path):
    server, by = verdicts
    server.says += ["1.0" if name == "mmvet" else "8 9\nGood."] * 3
    measured = judged(name, tmp_path, by, refuses)
    figures = {figure: value for figure, value in measured.document["figures"].items() if figure != "judge"}
    assert {*measured.scores} == {*figures.values()} == {0}
    assert reopen(TASKS[name], tmp_path / "run", measured.questions).scores == measured.scores


def test_llava_bench_is_relative_to_gpt_4(verdicts, tmp_path):
    server, by = verdicts
    server.says += ["8 6\nWell.", "9,9", "5 10\nSo."]
    measured = judged("llava-bench", tmp_path, by)
    assert measured.scores == [0.6, 0.9, 1.0]
    assert measured.document["figures"] == {
        "conv: relative score": round(100 * 16 / 13, 4), "detail: relative score": 100.0,
        "all: relative score": round(100 * 25 / 22, 4), "judge": "judge-1",
    }  # fmt: skip
    system, user = server.asked[0]["messages"]
    assert system["role"] == "system"
    assert user["content"] == (
        "[Context]\nA hill.\n\n[Question]\nQuestion 0?\n\n[Assistant 1]\nGPT-4's 0\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nOne.\n\n[End of Assistant 2]\n\n[System]\nCompare them.\n\n"
    )


def test_an_unreadable_review_counts_as_in_the_official_script():
    assert [score_pair(text) for text in ("8 9", "8,9.5\nx", "8, 9", "eight 9", "8", "")] == [[8, 9], [8, 9.5], *[[-1, -1]] * 4]


def test_a_judge_that_is_none_is_named(verdicts, tmp_path):
    server, by = verdicts
    server.says += ["HTML"]
    with pytest.raises(ValueError, match=r"line 1: the judge .* answers what no OpenAI-compatible server does: '<html>'; 0 of 3"):
        judged("llava-bench", tmp_path, by)


def test_a_judge_that_fails_is_named_and_goes_on_later(verdicts, tmp_path):
    server, by = verdicts
    server.says += ["8 6", 400]
    with pytest.raises(ValueError, match=r"questions.jsonl, line 2: the judge judge-1 at .* failed: 400: no more; 1 of 3 answers"):
        judged("llava-bench", tmp_path, by)
    server.says += [429, 500, "9 9", "5 10"]  # overload is waited for
    assert judged("llava-bench", tmp_path, by).scores == [0.6, 0.9, 1.0]
    assert len(server.asked) == 6


@pytest.mark.parametrize(("name", "file"), [("mmvet", "mm-vet_evaluator.py"), ("llava-bench", "rule.json")])
def test_a_judges_prompt_that_is_missing_is_named(name, file, tmp_path):
    CASES[name].write(tmp_path)
    (tmp_path / file).unlink()
    given = ("--task", name, "--data", tmp_path, "--url", "http://127.0.0.1:9", "--judge", "http://127.0.0.1:9/v1")
    assert f"{file} is missing: --judge takes its prompt" in refused(*given)  # before any server is asked


# ---- bad data


BAD = [
    # task, a file, what it holds instead, what is said
    ("vqav2", "v2_mscoco_val2014_annotations.json", {"annotations": []}, "questions.json, entry 1 (question_id 10): "),
    ("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", [1, 2], "questions.json: list indices must be integers"),
    ("okvqa", "mscoco_val2014_annotations.json", {"annotations": [{"question_id": 3}]}, "entry 1 (question_id 3): it has no"),
    ("textvqa", "TextVQA_0.5.1_val.json", {"data": [{"image_id": 1, "question": "?", "answers": ["a"]}]}, "entry 1: 1 answers"),
    ("textvqa", "llava_textvqa_val_v051_ocr.jsonl", [{"question_id": 1}], "ocr.jsonl, line 1: it has no 'text'"),
    ("vizwiz", "val.json", {"image": "x"}, "val.json: not a list of entries"),
    ("gqa", "testdev_balanced_questions.json", '{"1":\n {"question" }}', "questions.json, line 2: not JSON"),
    ("gqa", "testdev_balanced_questions.json", {"1": {"question": "?"}}, "questions.json, entry '1': it has no 'imageId'"),
    ("scienceqa", "problems.json", {}, "problems.json: no problem 1, which"),
    ("scienceqa", "pid_splits.json", {"train": []}, "pid_splits.json: no split 'test'; it has train"),
    ("mmbench", "mmbench_dev.tsv", "index\tquestion\tA\n1\tx\ty\n", "mmbench_dev.tsv, line 2: less than two options"),
    ("mmbench", "mmbench_dev.tsv", "index\tquestion\tA\tB\timage\n1\tx\ty\tz\t!!\n", "line 2: the picture is not base64"),
    ("mmbench", "second.tsv", "index\n", "several tables, choose by --split: mmbench_dev, second"),
    ("pope", "coco/coco_pope_random.json", [{"question_id": 1, "label": "maybe"}], "random.json, line 1: the label is 'maybe'"),
    ("pope", "coco/coco_pope_random.json", "{}\nno\n", "random.json, line 1: it has no 'label'"),
    ("mme", "MME_Benchmark_release_version/count/a.txt", "Is it one?\tYes\nIs it?\tmaybe\n", "a.txt, line 2: no question"),
    ("mme", "MME_Benchmark_release_version/count/z.txt", "Is it one?\tYes\n", "z.txt, line 1: the picture "),
    ("mmvet", "mm-vet.json", [], "mm-vet.json: not a JSON object"),
    ("llava-bench", "questions.jsonl", [{"question_id": 0}], "questions.jsonl, line 1: it has no 'image'"),
    ("llava-bench", "questions.jsonl", b"\xff\xfe", "questions.jsonl is not text"),
]


@pytest.mark.parametrize(("name", "file", "content", "message"), BAD, ids=[f"{name}-{n}" for n, (name, *_) in enumerate(BAD)])
def test_data_of_another_format_is_named(name, file, content, message, tmp_path):
    CASES[name].write(tmp_path)
    put(tmp_path / file, content)
    output = refused("embedded-dense", "--task", name, "--data", tmp_path)
    assert f"error: {tmp_path}" in output and message in output


@pytest.mark.parametrize("name", [name for name in CASES if name != "mmbench"])
def test_a_missing_picture_is_named_before_anything_is_asked(name, tmp_path):
    CASES[name].write(tmp_path)
    questions = TASKS[name].read(tmp_path, None)
    gone = next(question for question in questions if question.image)
    gone.image.unlink()
    with pytest.raises(DataError, match=rf"{gone.image}|picture .*{gone.image.stem}") as raised:
        check_pictures(TASKS[name].read(tmp_path, None))
    assert "missing" in str(raised.value) and ("line" in str(raised.value) or "entry" in str(raised.value))


def test_a_broken_picture_is_named_and_nothing_is_lost(checkpoint, tmp_path):
    CASES["vqav2"].write(tmp_path / "data")
    given = (checkpoint, "--task", "vqav2", "--data", tmp_path / "data", "--out", tmp_path / "runs", "--at-once", 1)
    put(tmp_path / "data/val2014/COCO_val2014_000000000002.jpg", b"no picture")
    output = refused(*given)
    assert "entry 5 (question_id 14): the picture" in output and "is not a JPEG" in output
    assert len(lines(tmp_path / "runs/vqav2/tiny-llava@off/answers.jsonl")) == 4


def test_files_that_are_not_there_are_named(tmp_path):
    for name in TASKS:
        output = refused("embedded-dense", "--task", name, "--data", tmp_path)
        assert f"error: {tmp_path}" in output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "pope"], "the task pope needs --data"),
        (["--task", "pope", "--data", ".", "--family", "one"], "the task pope has no --family"),
        (["--task", "pope", "--data", ".", "--judge", "http://x/v1"], "the task pope has no --judge"),
        (["--task", "scenes", "--data", "."], "the task scenes has no --data"),
        (["--task", "scenes", "--url", "http://x"], "the task scenes has no --url"),
        (["--data", "nowhere.jsonl", "--level", "strong"], "nowhere.jsonl is missing"),
        (["--data", ".", "--cards"], "a run on your own questions has no --cards"),
        (["--data", ".", "--split", "test"], "a run on your own questions has no --split; leave it out"),
        (["--task", "mmvet", "--data", ".", "--judge-model", "x"], "--judge-model needs --judge"),
        (["--task", "scenes", "--at-once", "2"], "the task scenes has no --at-once"),
        (["--out", "here"], "the task scenes has no --out"),
        (["--task", "perplexity", "--level", "strong"], "the task perplexity has no --level; leave it out"),
        (["--task", "perplexity", "--token-policy", "merging"], "the task perplexity has no --token-policy"),
        (["--cards", "--token-policy", "merging"], "--cards has no --token-policy: it asks at every level of the checkpoint"),
        (["--cards", "--level", "most"], "--cards has no --level: it asks at every level"),
        (["--compare", "off", "--level", "most"], "--compare has no --level: it lists the levels; leave one of them out"),
        (["--data", ".", "--url", "http://x", "--dtype", "float32"], "--url has no --dtype: the server was started with its own"),
        (["--compare", "off", "--picture", "nowhere/x.png"], "--picture: nowhere is not a directory"),
        (["--compare", "off", "--picture", "x.foo"], "--picture: x.foo must end in one of"),
        (["--compare", "off,most"], "level 'most' is not one of off, "),
    ],
)
def test_options_that_do_not_go_together_are_refused(given, message):
    assert message in refused("embedded-dense", *given)


def test_every_option_is_some_tasks():
    options = {field.name for field in fields(Options)}
    assert options == command.ALWAYS.union(*command.TAKES.values()) == set(signature(eval_).parameters)
    assert {name for without, _ in command.INSTEAD.values() for name in without} | {*command.INSTEAD, *command.NEEDS} <= options


def test_a_dense_checkpoint_beside_a_server_has_its_dtype(served, checkpoint, tmp_path):
    write_own(tmp_path, "What color is it?")
    given = ("--data", tmp_path / "own.jsonl", "--out", tmp_path / "runs", "--url", served[0], "--against", checkpoint)
    document, _ = evaluate(*given, "--dtype", "float32")
    assert document["n"] == 1


# ---- intervals


def test_questions_about_one_picture_vary_together():
    alone = interval([1.0, 0.0] * 50, range(100))
    together = interval([1.0, 1.0, 0.0, 0.0] * 25, [n // 2 for n in range(100)])
    assert alone == pytest.approx(wilson(50, 100), abs=2e-3)
    assert together == pytest.approx(wilson(25, 50), abs=3e-3)
    assert interval([1.0] * 10, range(10)) == wilson(10, 10)
    assert interval([1.0] * 10, [0] * 10) == wilson(1, 1)
    assert interval([], []) == (0.0, 1.0)
    assert clustered_error([0.3, 0.3], [1, 2]) == 0.0


def test_differences_have_an_interval_even_if_nothing_changed():
    assert difference_interval([0.0] * 100, range(100)) == (-0.03, 0.03)
    low, high = difference_interval([0.0] * 90 + [1.0] * 10, range(100))
    assert (low + high) / 2 == pytest.approx(0.1) and high - low == pytest.approx(2 * 1.96 * 0.03, abs=2e-3)
