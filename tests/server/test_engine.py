"""The engine on a tiny checkpoint with the real tokenizer and processor: who is answered what, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

import server.batch
from models.errors import CheckpointError
from models.flops import flops_ratio
from models.forward import decode_input, forward, prefill_input
from pruning.dynamic.planner import make_route
from server.engine import Engine
from server.run import build_engine
from server.settings import Settings
from tests.server.tiny import LAYERS, LEVELS, VISUAL, answer, ask, drain, new_engine, same, spoil, submit, total, value, write
from tests.server.tiny import stepped_engine as stepped_engine
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # a fixture

# ---- answers


def test_the_tiny_model_sees_pictures_questions_and_levels(engine):
    """Else the tests below would compare nothing."""
    readers = [answer(engine, picture, level=level, logprobs=0) for picture in (0, 1) for level in LEVELS]
    readers.append(answer(engine, 0, text="Read the sign.", logprobs=0))
    assert len({tuple(round(one.logprob, 2) for one in reader.logprobs) for reader in readers}) == len(readers)
    assert len({reader.text for reader in readers}) > 2
    assert all(reader.text.isascii() and len(reader.text) > 8 for reader in readers)


CASES = st.fixed_dictionaries(
    {
        "pictures": st.sampled_from([(0,), (1,), (2, 0), ()]),
        "text": st.sampled_from(["What color is the star?", "Describe the picture."]),
        "level": st.sampled_from(LEVELS),
        "max_tokens": st.integers(1, 10),
    }
)


@settings(max_examples=15)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 3), CASES), min_size=2, max_size=6), places=st.integers(1, 5),
    tokens=st.sampled_from([7, 50, 1000]),
)  # fmt: skip
def test_a_mixed_batch_joined_and_left_answers_as_each_alone(tiny, arrivals, places, tokens):
    """With prompts in parts of so many tokens, or whole."""
    engine, lone = new_engine(tiny, max_running=places, max_prefill=tokens), new_engine(tiny)
    readers = []
    for steps, case in arrivals:
        for _ in range(steps):
            engine.step()
        request = ask(engine, **case, logprobs=0)
        engine.submit(request)
        readers.append(request.emit)
    drain(engine)
    for reader, (_, case) in zip(readers, arrivals, strict=True):
        alone = ask(lone, **case, logprobs=0)
        lone.submit(alone)
        drain(lone)
        same(reader, alone.emit)


def test_answers_go_on_while_a_long_prompt_runs_in_parts(tiny):
    engine = new_engine(tiny, max_prefill=20)
    _, early = submit(engine, max_tokens=40, logprobs=0)
    while not early.events:
        engine.step()
    _, late = submit(engine, 1, 2, logprobs=0)
    said = []
    while not late.events:
        engine.step()
        said.append(len(early.logprobs))
    assert said == list(range(said[0], said[0] + len(said))), "a token in every pass"
    assert len(said) > 300 / 20
    drain(engine)
    same(late, answer(new_engine(tiny), 1, 2, logprobs=0))


def test_answers_and_a_part_of_a_prompt_run_in_one_native_call(tiny, monkeypatch):
    engine = new_engine(tiny, max_prefill=20)
    if engine.model.decode_plan is None or engine.model.decode_plan.max_rows < 20:
        pytest.skip("needs the native step")
    _, early = submit(engine, max_tokens=40)
    while not early.events:
        engine.step()
    submit(engine, 1)
    engine.step()
    passes = []
    monkeypatch.setattr(server.batch, "forward", lambda model, batch: passes.append(list(map(len, batch))) or forward(model, batch))
    engine.step()
    assert len(passes) == 1 and len(passes[0]) == 2, passes


def test_a_short_question_overtakes_a_long_prompt(tiny):
    engine = new_engine(tiny, max_prefill=20)
    _, long = submit(engine, 1, 2)
    engine.step()
    _, short = submit(engine, level="thin")
    while not short.events:
        engine.step()
    assert not long.events
    drain(engine)
    assert long.finished


def test_pictures_are_encoded_one_a_pass_while_answers_go_on(engine, monkeypatch):
    submit(engine, max_tokens=40)
    engine.step()
    encoded, encode = [], engine.model.encode
    monkeypatch.setattr(engine.model, "encode", lambda *picture: encoded.append(1) or encode(*picture))
    submit(engine, 1, 2, 3)
    counts = []
    for _ in range(4):
        engine.step()
        counts.append(len(encoded))
    assert counts == [1, 2, 3, 3]


@pytest.mark.parametrize("level", LEVELS)
def test_an_answer_is_what_the_model_says_on_the_route(engine, tiny, level):
    """Against a loop of its own: the prompt, then each token at the position it has in the undropped sequence."""
    request, reader = submit(engine, 0, level=level, logprobs=0)
    drain(engine)
    model = tiny.model
    images = [model.vision(image.picture.pixels) for image in request.images]
    (point,) = engine.menu[level].operating_points
    route, visual = make_route(point, images, LAYERS, tiny.manifest.calibration.layer_change)
    cache = model.new_cache(route.rows(len(request.prompt), 8))
    sequence = prefill_input(model, torch.tensor(request.prompt), visual, route, cache)
    expected, made = [], []
    for place in range(8):
        logprobs = forward(model, [sequence])[0].log_softmax(-1)
        made.append(int(logprobs.argmax()))
        expected.append(float(logprobs.max()))
        sequence = decode_input(model, torch.tensor(made[-1:]), len(request.prompt) + place, route, cache)
    assert reader.text == tiny.preprocessor.tokenizer.decode(made, skip_special_tokens=True).lstrip()
    assert [one.logprob for one in reader.logprobs] == pytest.approx(expected, abs=1e-3)


def test_at_off_an_answer_is_transformers_own(engine, tiny):
    reference = LlavaForConditionalGeneration.from_pretrained(tiny.directory, dtype=torch.float32)
    for pictures in ((0,), (1, 2)):
        request = ask(engine, pictures)
        engine.submit(request)
        drain(engine)
        pixels = torch.cat([image.picture.pixels for image in request.images])
        prompt = torch.tensor([request.prompt])
        made = reference.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), pixel_values=pixels, max_new_tokens=8, do_sample=False
        )[0, len(request.prompt) :]
        assert request.emit.text == tiny.preprocessor.tokenizer.decode(made, skip_special_tokens=True).lstrip()


@pytest.mark.parametrize("tokens", [1024, 64], ids=["at once", "in parts"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_further_question_starts_behind_the_picture(tiny, level, tokens):
    engine = new_engine(tiny, max_prefill=tokens)
    first = answer(engine, 0, level=level, logprobs=0)
    further = answer(engine, 0, level=level, text="Read the sign.", logprobs=0)
    assert first.finished.cached_tokens == 0
    assert further.finished.cached_tokens >= further.started.receipt.visual_tokens
    same(further, answer(new_engine(tiny), 0, level=level, text="Read the sign.", logprobs=0))
    assert answer(engine, 1, level=level).finished.cached_tokens == 0, "another picture"
    assert (value(engine, "cache_queries_total", cache="prefix"), value(engine, "cache_hits_total", cache="prefix")) == (3, 1)


def test_a_prompt_that_ends_with_its_picture_may_be_asked_again(engine):
    readers = []
    for _ in range(2):
        request = ask(engine)
        end = len(request.prompt) - request.prompt[::-1].index(engine.model.config.image_token_id)
        engine.submit(replace(request, prompt=request.prompt[:end]))
        drain(engine)
        readers.append(request.emit)
    assert readers[0].answer == readers[1].answer


def test_levels_do_not_share_beginnings(engine):
    answer(engine, 0, level="balanced")
    assert answer(engine, 0, level="off").finished.cached_tokens == 0


def test_a_full_batch_of_all_levels_runs_together(engine):
    alone = {level: answer(engine, 0, level=level, logprobs=0) for level in LEVELS}
    readers = {level: submit(engine, 0, level=level, logprobs=0)[1] for level in LEVELS}
    engine.step()
    assert len(engine.scheduler.running) == len(LEVELS)
    assert all(len(reader.logprobs) == 1 for reader in readers.values()), "all prompts in one step"
    drain(engine)
    for level in LEVELS:
        same(readers[level], alone[level])


def test_a_prompt_without_a_picture_is_answered(engine):
    request = ask(engine, (), level="strong")
    engine.submit(request)
    drain(engine)
    receipt = request.emit.finished.receipt
    assert (receipt.visual_tokens, receipt.visual_tokens_total, receipt.layers) == (0, 0, LAYERS)


def test_the_same_picture_and_level_repeat_receipt_and_answer(engine):
    first, second = (answer(engine, 1, level="balanced", logprobs=1) for _ in range(2))
    assert first.finished.receipt == second.finished.receipt
    same(first, second)


@pytest.mark.parametrize("level", LEVELS)
def test_the_receipt_is_the_route_and_the_memory_what_it_needs(engine, tiny, level):
    request, reader = submit(engine, 0, 2, level=level, max_tokens=5)
    engine.step()
    features = [tiny.model.vision(image.picture.pixels) for image in request.images]
    change = tiny.manifest.calibration.layer_change
    route, _ = make_route(engine.menu[level].operating_points[0], features, LAYERS, change)
    receipt = reader.started.receipt
    assert (receipt.visual_tokens, receipt.visual_tokens_total) == (len(route.kept_tokens), 2 * VISUAL)
    assert (receipt.layers, receipt.layers_total) == (sum(route.layers), LAYERS)
    assert receipt.flops_ratio == pytest.approx(flops_ratio(tiny.model.config, route, len(request.prompt)), abs=1e-4)
    assert (receipt.flops_ratio == 1) == (level == "off")
    assert (receipt.level, receipt.reason, receipt.checkpoint) == (level, "body", tiny.fingerprint)
    assert engine.kv.used == engine.scheduler.used == sum(route.rows(len(request.prompt))) + 5 * sum(route.layers)
    drain(engine)
    assert reader.finished.receipt == receipt
    assert reader.finished.prompt_tokens == len(request.prompt)


def test_events_come_in_order(engine):
    reader = answer(engine, max_tokens=6)
    kinds = [type(event).__name__ for event in reader.events]
    assert kinds[0] == "Started"
    assert kinds[-1] == "Finished"
    assert set(kinds[1:-1]) == {"Delta"}
    assert reader.started.timings.keys() >= {"queue", "encode", "route", "prefill"}
    assert reader.finished.timings.keys() >= {"queue", "encode", "route", "prefill", "decode"}
    assert all(seconds >= 0 for seconds in reader.finished.timings.values())


# ---- how an answer ends


@pytest.mark.parametrize("count", [1, 2, 9])
def test_max_tokens_ends_with_length(engine, count):
    reader = answer(engine, max_tokens=count, logprobs=0)
    assert reader.finished.reason == "length"
    assert reader.finished.completion_tokens == len(reader.logprobs) == count


def test_an_end_token_ends_with_stop(engine):
    whole = answer(engine, 0, level="thin", logprobs=0)
    spelled = [one.token for one in whole.logprobs]
    place = next(at for at, token in enumerate(spelled) if at and token not in spelled[:at])
    vocabulary = range(len(engine.preprocessor.tokenizer))
    ends = frozenset(t for t in vocabulary if engine.preprocessor.tokenizer.decode([t]) == spelled[place])
    reader = answer(new_engine(replace(engine.checkpoint, eos=ends)), 0, level="thin", logprobs=0)
    assert (reader.finished.reason, reader.finished.completion_tokens) == ("stop", place + 1)
    assert whole.text.startswith(reader.text)
    assert spelled[place] not in reader.text
    assert len(reader.logprobs) == place + 1


def test_a_stop_string_ends_the_answer_before_it(engine):
    whole = answer(engine, 0, level="thin", max_tokens=12).text
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    reader = answer(engine, 0, level="thin", max_tokens=12, stop=("never seen", stop))
    assert reader.text == whole[: whole.index(stop)]
    assert reader.finished.reason == "stop"
    assert reader.finished.completion_tokens < 12


def test_the_context_bounds_the_answer(engine):
    text = " ".join(["star"] * 850)
    request, reader = submit(engine, 0, text=text, max_tokens=10_000)
    remaining = engine.context_length - len(request.prompt)
    assert 0 < remaining < 200
    drain(engine)
    assert (reader.finished.reason, reader.finished.completion_tokens) == ("length", remaining)


# ---- how tokens are drawn


def test_a_seed_repeats_an_answer_alone_and_in_company(engine):
    luck = {"temperature": 1.0, "top_p": 0.95, "logprobs": 0}
    first = answer(engine, 0, seed=5, **luck)
    _, again = submit(engine, 0, seed=5, **luck)
    _, other = submit(engine, 0, seed=6, **luck)
    submit(engine, 1, seed=5, **luck)
    drain(engine)
    same(again, first)
    assert other.text != first.text


def test_logprobs_tell_what_was_likely(engine):
    reader = answer(engine, 0, max_tokens=6, logprobs=3)
    assert len(reader.logprobs) == 6
    for one in reader.logprobs:
        assert one.logprob <= 0
        assert len(one.top) == 3
        assert [other.logprob for other in one.top] == sorted((other.logprob for other in one.top), reverse=True)
        assert (one.token, one.logprob) == (one.top[0].token, one.top[0].logprob), "greedy takes the likeliest"
    assert not answer(engine, 0).logprobs
    assert all(not one.top for one in answer(engine, 0, logprobs=0).logprobs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_forbids_repetition(engine, temperature):
    reader = answer(engine, 0, max_tokens=40, temperature=temperature, seed=1, presence_penalty=1e4, logprobs=0)
    made = [one.token for one in reader.logprobs if one.token.isascii()]  # bytes of characters are spelled alike
    assert len(set(made)) == len(made) > 20
    assert len({one.token for one in answer(engine, 0, max_tokens=40, logprobs=0).logprobs}) < 40


# ---- what is remembered and counted


def test_a_picture_is_encoded_once_whatever_the_level(engine, monkeypatch):
    encoded = []
    vision = engine.model.vision
    monkeypatch.setattr(engine.model, "vision", lambda pixels, ratio: encoded.append(len(pixels)) or vision(pixels, ratio))
    for level in LEVELS:
        answer(engine, 0, level=level)
    answer(engine, 1)
    answer(engine, 1, 1)
    assert encoded == [1, 1]
    assert value(engine, "cache_hits_total", cache="image") == len(LEVELS) - 1 + 2


@pytest.mark.parametrize("size", [0, 1])
def test_forgotten_pictures_are_encoded_again_to_the_same_answer(tiny, size):
    engine = new_engine(tiny, cached_images=size)
    first = answer(engine, 0, 1, 2, logprobs=0)
    same(answer(engine, 0, 1, 2, logprobs=0), first)
    assert value(engine, "cache_hits_total", cache="image") == 0


def test_the_counters_add_up(engine, caplog):
    requests = [submit(engine, picture, level=level) for picture, level in zip(islice(cycle((0, 1)), 5), LEVELS, strict=True)]
    failed = spoil(ask(engine, (1,)), torch.zeros(3, 8, 8))
    engine.submit(failed)
    waiting, _ = submit(engine, 2)
    engine.abort(waiting.id)
    drain(engine)
    done = [reader.finished for _, reader in requests]
    receipts = [one.receipt for one in done]
    assert total(engine, "requests_total") == len(requests) + 2
    assert total(engine, "requests_total", outcome="length") == len(requests)
    assert total(engine, "request_seconds_count") == total(engine, "time_to_first_token_seconds_count") == len(requests)
    assert total(engine, "generated_tokens_total") == sum(one.completion_tokens for one in done)
    assert total(engine, "inter_token_seconds_count") == sum(one.completion_tokens - 1 for one in done)
    assert total(engine, "prompt_tokens_total") == sum(one.prompt_tokens for one in done)
    for receipt in receipts:
        kept, dropped = (value(engine, "visual_tokens_total", level=receipt.level, outcome=o) for o in ("kept", "dropped"))
        assert (kept, kept + dropped) == (receipt.visual_tokens, receipt.visual_tokens_total)
        run, skipped = (value(engine, "layers_total", level=receipt.level, outcome=o) for o in ("run", "skipped"))
        assert (run, run + skipped) == (receipt.layers, receipt.layers_total)
        assert value(engine, "flops_ratio_sum", level=receipt.level) == pytest.approx(receipt.flops_ratio)
    for stage in ("prefill", "decode"):
        assert value(engine, "stage_seconds_count", stage=stage) == len(requests)


def test_the_gauges_show_the_load(tiny):
    engine = new_engine(tiny, max_running=2, kv_rows=10_000)
    assert value(engine, "weight_bytes", format="dense") == tiny.model.weight_bytes > 0
    assert value(engine, "weight_sparsity_ratio", module="language") == tiny.model.sparsity()["language"] < 0.01
    assert value(engine, "weight_sparsity_ratio", module="head") > 0.01  # tokens that are no words
    for _ in range(5):
        submit(engine)
    engine.step()
    assert (value(engine, "requests_running"), value(engine, "requests_waiting")) == (2, 3)
    assert value(engine, "kv_cache_usage_ratio") == engine.kv.used / 10_000 > 0
    drain(engine)
    names = ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
    assert [value(engine, name) for name in names] == [0, 0, 0]


# ---- building one


def test_an_engine_from_settings_holds_what_they_say(tmp_path):
    directory = write(tmp_path / "tiny-sixteen", layers=16)
    settings = Settings(
        checkpoint=str(directory), kv_tokens=400, max_batch=3, max_queue=5, max_prefill=32, default_level="strong",
        token_policy="merging",
    )  # fmt: skip
    engine = build_engine(settings, None, settings.checkpoint)
    assert engine.kv.budget == 400 * 16
    scheduler = engine.scheduler
    assert (scheduler.max_running, scheduler.max_waiting, scheduler.max_prefill) == (3, 5, 32)
    assert (engine.default_level, engine.token_policy, engine.model_name) == ("strong", "merging", "tiny-sixteen")
    receipt = answer(engine, level="strong").finished.receipt
    assert (receipt.layers, receipt.layers_total) == (15, 16), "the menu's own layer skipping, from the calibration"


@pytest.mark.parametrize(("setting", "word"), [({"kv_tokens": 5}, "kv_tokens"), ({"device": "cuda:99"}, "cuda:99")])
def test_settings_under_which_nothing_runs_are_refused(tmp_path, setting, word):
    with pytest.raises((CheckpointError, ValueError), match=word):
        build_engine(Settings(**setting), None, str(write(tmp_path / "tiny")))


def test_the_cache_takes_a_share_of_free_memory_by_default(tiny):
    engine = Engine(tiny)
    assert 0 < engine.kv.budget <= 8 * engine.context_length * LAYERS
    assert answer(engine).finished


def test_an_answer_ends_at_a_token_id_but_not_too_early(engine: Engine) -> None:
    whole, _ = submit(engine, max_tokens=6)
    running = []
    while not engine.scheduler.idle:
        engine.step()
        running = [one.output_ids for one in engine._running.values()] or running
    third = running[0][2]
    assert whole.id
    first = running[0].index(third)
    ended = answer(engine, max_tokens=6, stop_token_ids=(third,)).finished
    assert (ended.reason, ended.completion_tokens) == ("stop", first + 1)
    later = answer(engine, max_tokens=6, stop_token_ids=(third,), min_tokens=5).finished
    assert later.completion_tokens >= 6


def test_a_model_that_ends_may_be_ignored(engine: Engine) -> None:
    eos = min(engine.checkpoint.eos)
    assert answer(engine, max_tokens=4, logit_bias=((eos, 100.0),)).answer == ("", 1, "stop")
    assert answer(engine, max_tokens=4, logit_bias=((eos, 100.0),), ignore_eos=True).answer == ("", 4, "length")
    assert answer(engine, max_tokens=4, logit_bias=((eos, 100.0),), min_tokens=2).finished.completion_tokens == 3


@pytest.mark.parametrize("stops", [False, True])
def test_the_bytes_of_all_tokens_are_the_content(engine: Engine, stops: bool) -> None:
    text = answer(engine, max_tokens=12).text
    stop = text[5:9]
    reader = answer(engine, max_tokens=12, logprobs=0, stop=(stop,) if stops else ())
    assert reader.text == (text.partition(stop)[0] if stops else text)
    assert b"".join(one.bytes for one in reader.logprobs).decode() == reader.text
    assert len(reader.logprobs) == reader.finished.completion_tokens


def test_a_token_that_ends_has_its_name_and_no_bytes(engine: Engine) -> None:
    eos = min(engine.checkpoint.eos)
    (only,) = answer(engine, max_tokens=4, logit_bias=((eos, 100.0),), logprobs=1).logprobs
    assert (only.token, only.bytes) == ("</s>", b"")


def test_a_line_in_the_log_says_how_a_request_went(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "espalier.engine")
    request, reader = submit(engine, max_tokens=3, text="What secret is it?")
    drain(engine)
    (line,) = caplog.messages
    assert line.startswith(f"request {request.id}: length, level off, {len(request.prompt)} prompt and 3 new tokens")
    assert "secret" not in line and reader.text not in line


