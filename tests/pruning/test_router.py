"""The router: what it is taught, what it makes of a question, how it is trained, and when it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from models.checkpoint import CheckpointError, load, read_manifest, sha256
from models.pictures import DataError
from models.work import WorkError
from pruning.dynamic import train
from pruning.dynamic.gaze import WORDS, Asked, answers, gaze, words
from pruning.dynamic.router import FILE, Router, RouterFailed, Shape, load_router, score
from pruning.dynamic.train import Lesson, run
from server.engine import Engine
from tests.pruning.kills import Killed, die_at
from tests.server.tiny import VISUAL, answer, ask, drain, new_engine, submit, write

QUICK: dict[str, Any] = {"pictures": 10, "questions": 2, "answer": 4, "steps": 30, "batch": 4}


@pytest.fixture(scope="module", name="plain")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture(scope="module", name="routed")
def routed_checkpoint(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("routed") / "routed"
    run(Lesson(**QUICK), str(plain), out, quiet=True)
    return out


def question(checkpoint: Any, text: str = "What color is the star?", picture: int = 0) -> Asked:
    engine = Engine(checkpoint)
    request = ask(engine, (picture,), text)
    return Asked(request.prompt, checkpoint.model.vision(request.images[0].pixels[None]).tokens[0])


def test_the_gaze_is_the_most_attention_that_transformers_computes(plain):
    checkpoint = load(plain)
    asked, answer_ids = question(checkpoint), [40, 41, 42]
    reference = LlavaForConditionalGeneration.from_pretrained(plain, attn_implementation="eager")
    ids = torch.tensor([[*asked.prompt, *answer_ids]])
    engine = Engine(checkpoint)
    pixels = ask(engine).images[0].pixels[None]
    with torch.no_grad():
        maps = torch.cat(reference(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions)
    visual = (ids[0] == reference.config.image_token_id).nonzero()[:, 0]
    after = torch.arange(int(visual[-1]) + 1, ids.shape[1])
    wanted = maps[:, :, after][..., visual].amax((0, 1, 2))
    torch.testing.assert_close(gaze(checkpoint.model, asked, answer_ids), wanted, rtol=1e-3, atol=1e-5)


def test_answers_are_what_the_engine_says_at_level_off(plain):
    checkpoint = load(plain)
    asked = [question(checkpoint, picture=i) for i in range(2)]
    said = answers(checkpoint.model, asked, checkpoint.eos, 6)
    decode = checkpoint.preprocessor.tokenizer.decode
    for number, tokens in enumerate(said):
        assert decode(tokens).strip() == answer(new_engine(checkpoint), number, max_tokens=6).text.strip()


def test_the_router_reads_the_end_of_the_prompt_but_nothing_before_the_picture():
    assert words([1, 5, 9, 9, 6, 7], image_token=9) == [6, 7]
    assert words([1, 9, 5, 9, 6], image_token=9) == [5, 6]
    assert words(list(range(100, 300)), image_token=9) == list(range(300 - WORDS, 300))


def test_scores_depend_on_the_question_and_not_on_what_stands_beside():
    torch.manual_seed(0)
    router = Router(Shape(width=24, rows=16))
    visual, read = torch.randn(2, 9, 24), torch.randn(2, 5, 24)
    present = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    together = router(visual, read, present)
    torch.testing.assert_close(together[1], router(visual[1:], read[1:, :3])[0])
    assert not torch.allclose(together[:1], router(visual[:1], read[1:]), atol=1e-3)


@pytest.mark.parametrize("tokens", [1, 5, 16, 577])
def test_pictures_of_any_number_of_tokens_and_no_question_have_scores(tokens):
    assert Router(Shape(24, 16))(torch.randn(1, tokens, 24), torch.randn(1, 0, 24)).shape == (1, tokens)


def test_it_costs_under_three_percent_of_a_prefill_at_7b():
    shape, rows = Shape(4096, 1024), 576 + 40
    dense = 2 * rows * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert shape.flops(rows) < 0.03 * dense


def test_a_checkpoint_with_a_router_holds_the_same_weights_and_serves_it(plain, routed):
    assert sha256(routed / "model.safetensors") == read_manifest(routed).files["model.safetensors"]
    assert load(plain).fingerprint == load(routed).fingerprint
    engine = new_engine(load(routed))
    assert engine.token_policy == "router"
    receipts = [answer(engine, 0, level=level).finished.receipt for level in ("off", "balanced")]
    assert [receipt.visual_tokens for receipt in receipts] == [VISUAL, VISUAL // 3]
    assert receipts[0].flops_ratio == 1.0
    merging = answer(Engine(load(routed), token_policy="merging"), 0, level="balanced").finished.receipt
    assert receipts[1].flops_ratio > merging.flops_ratio, "the router's own work is counted"


def test_the_router_is_asked_for_every_picture_of_a_request(routed):
    engine = new_engine(load(routed))
    receipt = answer(engine, 0, 1, level="balanced").finished.receipt
    assert (receipt.visual_tokens, receipt.visual_tokens_total) == (2 * (VISUAL // 3), 2 * VISUAL)


def test_without_a_picture_there_is_nothing_to_route(routed):
    request = ask(new_engine(load(routed)), (), level="balanced")
    engine = new_engine(load(routed))
    engine.submit(request)
    drain(engine)
    assert request.emit.finished.receipt.visual_tokens_total == 0


def test_scores_that_are_not_finite_send_the_request_to_level_off(routed):
    engine = new_engine(load(routed))
    expected = answer(engine, 0, level="off")
    engine.router.head.bias.fill_(torch.nan)
    request, reader = submit(engine, 0, level="balanced")
    drain(engine)
    assert reader.answer == expected.answer
    assert (reader.finished.receipt.level, request.reason) == ("off", "the router failed at level balanced")
    count = engine.metrics.registry.get_sample_value("espalier_degradations_total", {"from": "balanced", "to": "off"})
    assert count == 1
    with pytest.raises(RouterFailed):
        score(engine.router, engine.model, [engine.model.vision(request.images[0].pixels[None])], [5])


# ---- training


@pytest.mark.parametrize(("name", "call", "left"), [("_watch", 2, 1), ("_foresee", 25, 11), ("derive", 1, 1)])
def test_a_killed_run_goes_on_and_ends_as_one_that_never_stopped(plain, routed, tmp_path, monkeypatch, name, call, left):
    monkeypatch.setattr(train, "SAVE_EVERY", 10)
    with monkeypatch.context() as patch:
        die_at(patch, train, name, call)
        with pytest.raises(Killed):
            run(Lesson(**QUICK), str(plain), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    again = die_at(monkeypatch, train, name, -1)
    run(Lesson(**QUICK), str(plain), tmp_path / "out", quiet=True)
    assert again[0] == left  # of the fit: ten steps, and once the pictures that were held out
    assert read_manifest(tmp_path / "out").files == read_manifest(routed).files
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_another_lesson_does_not_go_on_with_a_killed_run(plain, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, train, "_watch", 2)
        with pytest.raises(Killed):
            run(Lesson(**QUICK), str(plain), tmp_path / "out", quiet=True)
    with pytest.raises(WorkError, match="unfinished run of another recipe"):
        run(Lesson(**QUICK, seed=1), str(plain), tmp_path / "out", quiet=True)


def test_it_learns_from_a_file_without_answers(plain, tmp_path):
    lines = []
    for number in range(3):
        shutil.copy("docs/samples/sign.png", tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "What is written?"}))
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(lines))
    lesson = Lesson(data=str(data), pictures=3, questions=1, answer=3, steps=2, batch=2)
    record = run(lesson, str(plain), tmp_path / "out", quiet=True).router
    assert record.report["questions"] == 3
    with pytest.raises(DataError, match="has 3 samples and 4 are asked for"):
        run(lesson.model_copy(update={"pictures": 4}), str(plain), tmp_path / "more", quiet=True)


def test_what_cannot_be_done_is_said_before_the_work(plain, tmp_path):
    with pytest.raises(ValueError, match="exists; name a directory that does not"):
        run(Lesson(), str(plain), tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"none\.jsonl is not a file"):
        run(Lesson(data="none.jsonl"), str(plain), tmp_path / "out", quiet=True)


# ---- refusals


def copy(routed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(routed, tmp_path / "copy"))


def test_a_router_of_another_checkpoint_is_refused(routed, tmp_path):
    directory = copy(routed, tmp_path)
    manifest = json.loads((directory / "espalier.json").read_text())
    manifest["router"]["checkpoint"] = "fp_000000000000"
    (directory / "espalier.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="was trained for checkpoint fp_000000000000 and this one is fp_"):
        Engine(load(directory))


def test_a_truncated_router_is_refused(routed, tmp_path):
    directory = copy(routed, tmp_path)
    whole = (directory / FILE).read_bytes()
    (directory / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"router\.safetensors is not the file that espalier\.json describes"):
        load(directory)
    manifest = json.loads((directory / "espalier.json").read_text())
    del manifest["files"][FILE]
    (directory / "espalier.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"does not load .*; run `espalier route`"):
        load_router(load(directory))


def test_a_policy_that_needs_a_router_is_refused_without_one(plain):
    with pytest.raises(ValueError, match="has no router; train one with `espalier route`"):
        Engine(load(plain), token_policy="router")
