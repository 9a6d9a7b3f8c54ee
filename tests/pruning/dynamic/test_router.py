"""The router: what it reads, what it makes of a request at each level, and when it is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from espalier import app
from models.checkpoint import load, sha256
from models.flops import flops_ratio
from models.manifest import CheckpointError, read_manifest
from models.vision.features import ImageFeatures
from pruning.dynamic.levels import AUTO, PRUNED, choose, layers_passed, make_route, menu_of, worthwhile_level
from pruning.dynamic.router import WORDS, Reading, Router, RouterFailed, Shape, read_request, words
from pruning.dynamic.router_file import FILE, RouterRecord, load_router
from pruning.dynamic.token_merging import euclidean, means, members
from server.engine import Engine
from tests.pruning.dynamic.tiny_router import expect, plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.server.tiny import VISUAL, answer, ask, drain, new_engine, submit


def test_the_router_reads_the_end_of_the_prompt_but_nothing_before_the_picture():
    assert words([1, 5, 9, 9, 6, 7], image_token=9) == [6, 7]
    assert words([1, 9, 5, 9, 6], image_token=9) == [5, 6]
    assert words(list(range(100, 300)), image_token=9) == list(range(300 - WORDS, 300))


def test_scores_depend_on_the_question_and_not_on_what_stands_beside():
    torch.manual_seed(0)
    router = Router(Shape(width=24, layers=3, rows=16))
    visual, asked = torch.randn(2, 9, 24), torch.randn(2, 5, 24)
    present = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    together, alone = router(visual, asked, present), router(visual[1:], asked[1:, :3])
    other = router(visual[:1], asked[1:])
    for part in ("looks", "costs"):
        torch.testing.assert_close(getattr(together, part)[1], getattr(alone, part)[0])
        assert not torch.allclose(getattr(together, part)[:1], getattr(other, part), atol=1e-3)
    torch.testing.assert_close(router.impression(together)[1], router.impression(alone)[0])
    kept = torch.tensor([[0, 4, 7]])
    shares = members(euclidean(visual[1:]), kept)
    torch.nn.init.normal_(router.write.out.weight)
    written = router.write(type(together)(*(part[1:] for part in together)), visual[1:], kept, shares)
    torch.testing.assert_close(written, router.write(alone, visual[1:], kept, shares))


@pytest.mark.parametrize("tokens", [1, 5, 16, 577])
def test_pictures_of_any_number_of_tokens_and_no_question_are_read(tokens):
    router = Router(Shape(24, 4, 16))
    read = router(torch.randn(1, tokens, 24), torch.randn(1, 0, 24))
    assert (read.looks.shape, read.costs.shape) == ((1, tokens), (1, 4))
    assert torch.isfinite(router.trust(router.impression(read))).all()


def test_an_untrained_router_leaves_the_plain_means():
    torch.manual_seed(0)
    router, visual = Router(Shape(24, 4, 16)), torch.randn(1, 12, 24)
    kept = Reading(router, visual, router(visual, torch.randn(1, 3, 24))).keep(0, 5)
    expected = means(visual[0], members(euclidean(visual[0]), kept.indices))
    torch.testing.assert_close(kept.tokens[kept.indices], expected)
    assert sum(kept.sizes) == 12


def test_it_costs_under_three_percent_of_a_prefill_at_7b():
    shape, rows = Shape(4096, 32, 1024), 576 + 40
    dense = 2 * rows * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert shape.flops(576, 40, 0) < shape.flops(576, 40, 288) < 0.03 * dense


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 12), st.data())
def test_visual_rows_pass_the_cheapest_layers_by_never_the_first_the_last_or_one_that_is_left_out(runs, passed, data):
    costs = data.draw(st.lists(st.floats(-9, 9), min_size=len(runs), max_size=len(runs)))
    chosen = layers_passed(runs, passed, costs)
    inner = [layer for layer in range(1, len(runs) - 1) if runs[layer]]
    assert chosen <= set(inner)
    assert len(chosen) == min(passed, len(inner))
    assert all(costs[a] <= costs[b] for a in chosen for b in inner if b not in chosen)


# ---- serving

RUNGS = 17
"""Of the tiny checkpoint's ladder, the whole model aside."""
RISING = [0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99]


@given(data=st.data(), rungs=st.integers(2, 6))
def test_a_price_buys_what_no_fixed_rung_does_for_as_much(data, rungs):
    """At what the prices spend on average, no single rung for all requests is expected to keep more answers."""
    share = st.floats(0, 1, width=32)
    chances = torch.tensor(data.draw(st.lists(st.lists(share, min_size=rungs, max_size=rungs), min_size=1, max_size=8)))
    costs = torch.tensor(sorted(data.draw(st.lists(share, min_size=rungs, max_size=rungs))))
    low, high = sorted(data.draw(st.lists(st.floats(0.01, 10), min_size=2, max_size=2)))
    few, many = (choose(chances, costs, price) for price in (high, low))
    assert costs[few].mean() <= costs[many].mean() + 1e-6, "a higher price never spends more"
    kept, spent = chances.gather(1, few[:, None]).mean(), costs[few].mean()
    for rung in range(rungs):
        if costs[rung] <= spent:
            assert chances[:, rung].mean() <= kept + 1e-5


def test_a_checkpoint_with_a_router_holds_the_same_weights_and_serves_it(plain, routed):
    assert sha256(routed / "model.safetensors") == read_manifest(routed).files["model.safetensors"]
    assert load(plain).fingerprint == load(routed).fingerprint
    modes = {path.stat().st_mode for path in routed.iterdir() if path.suffix == ".safetensors"}
    assert modes == {(routed / "espalier.json").stat().st_mode}, "a server that runs as another user reads them all"
    engine = new_engine(load(routed))
    assert engine.token_policy == "router"
    for level in ("off", *PRUNED):
        receipt = answer(engine, 0, level=level).finished.receipt
        assert receipt.level == level
        assert (receipt.flops_ratio == 1.0) == (level == "off")


def test_levels_are_the_prices_that_were_found(plain, routed):
    record = RouterRecord.of(read_manifest(routed))
    menu = Engine(load(routed)).menu
    for name, found in record.levels.items():
        assert (menu[name].price, menu[name].visual_ratio) == (found["price"], found["visual_ratio"])
        assert f"{found['flops_ratio']:.0%} of the FLOPs" in menu[name].description
        assert [asdict(rung) for rung in menu[name].rungs] == record.rungs
    assert list(menu) == ["off", "light", "balanced", "strong", AUTO]
    assert AUTO not in Engine(load(plain)).menu
    assert AUTO not in Engine(load(routed), token_policy="merging").menu, "nobody is there to choose"


def test_the_routers_own_work_is_counted(routed):
    engine = Engine(load(routed))
    request = ask(engine, (0,), level="balanced")
    expect(engine.router, RISING)
    level, _ = engine.menu["balanced"].settled([*RISING, 1.0])
    image = engine.model.vision(request.images[0].pixels[None])
    reading = read_request(engine.router, engine.model, [image], words(request.prompt, engine.model.config.image_token_id))
    receipt = answer(engine, 0, level="balanced").finished.receipt
    shape = engine.router.shape
    assert reading.flops(level.kept(VISUAL)) == shape.flops(VISUAL, len(reading.read.words[0]), level.kept(VISUAL)) > 0
    route, _ = make_route(level, [image], 3, None, "router", 0, reading)
    prompt, config = len(request.prompt), engine.model.config
    assert receipt.flops_ratio == pytest.approx(flops_ratio(config, route, prompt, reading.flops(len(route.kept_tokens))), abs=1e-4)
    assert receipt.flops_ratio > flops_ratio(config, route, prompt)


def test_every_picture_of_a_request_is_routed(routed):
    engine = new_engine(load(routed))
    expect(engine.router, RISING)
    level, chance = engine.menu["balanced"].settled([*RISING, 1.0])
    receipt = answer(engine, 0, 1, level="balanced").finished.receipt
    assert (receipt.visual_tokens, receipt.visual_tokens_total) == (2 * level.kept(VISUAL), 2 * VISUAL)
    assert receipt.expected_agreement == pytest.approx(chance, abs=1e-3)


def test_a_receipt_tells_how_many_layers_visual_tokens_passed_by(routed):
    engine = new_engine(load(routed))
    for place in (place for place, rung in enumerate(engine.menu["strong"].rungs[:-1]) if rung.passed_layers):
        expect(engine.router, [0.99 if rung == place else 0.01 for rung in range(RUNGS)])
        engine.menu["strong"] = replace(engine.menu["strong"], price=0.1)
        receipt = answer(engine, 0, level="strong").finished.receipt
        assert receipt.passed_layers == engine.menu["strong"].rungs[place].passed_layers > 0
    passed = engine.metrics.registry.get_sample_value("espalier_layers_total", {"level": "strong", "outcome": "passed"})
    assert passed >= receipt.passed_layers


def test_a_question_that_needs_more_is_given_more_at_the_same_level(routed):
    engine = new_engine(load(routed))
    engine.menu["strong"] = replace(engine.menu["strong"], price=0.5)
    given = []
    for hard in (False, True):
        expect(engine.router, [0.02] * (RUNGS - 1) + [0.9] if hard else [0.99] * RUNGS)
        given.append(answer(engine, 0, level="strong").finished.receipt)
        assert engine.scheduler.used == engine.kv.used == 0
    easy, hard_one = given
    assert easy.visual_tokens < hard_one.visual_tokens
    assert easy.flops_ratio < hard_one.flops_ratio
    seen = engine.metrics.registry.get_sample_value("espalier_expected_agreement_ratio_count", {"level": "strong"})
    assert seen == 2


def test_a_later_question_chooses_anew_from_all_that_the_picture_has(routed):
    """What an earlier question let go is kept as features, and a later turn reads them again."""
    engine = new_engine(load(routed))
    expect(engine.router, RISING)
    level, _ = engine.menu["balanced"].settled([*RISING, 1.0])
    answer(engine, 0, text="What color is the star?", level="balanced")
    request = ask(engine, (0,), level="balanced")
    request.prompt = engine.preprocessor.question("How many are there?", [("What color is the star?", "red")])
    engine.submit(request)
    drain(engine)
    later = request.emit.finished.receipt
    assert (later.visual_tokens, later.visual_tokens_total) == (level.kept(VISUAL), VISUAL)
    assert engine.metrics.registry.get_sample_value("espalier_cache_hits_total", {"cache": "image"}) == 1


@pytest.mark.parametrize("level", ["balanced", AUTO])
def test_without_a_picture_there_is_nothing_to_route(routed, level):
    engine = new_engine(load(routed))
    request = ask(engine, (), level=level)
    engine.submit(request)
    drain(engine)
    receipt = request.emit.finished.receipt
    assert (receipt.visual_tokens_total, receipt.flops_ratio, receipt.expected_agreement) == (0, 1.0, None)
    assert receipt.level == ("off" if level == AUTO else level)


@given(st.lists(st.floats(0, 1, width=32), min_size=RUNGS, max_size=RUNGS), st.floats(0.001, 10))
def test_auto_takes_the_level_with_the_least_expected_loss_at_its_own_price(routed, chances, price):
    menu = menu_of(read_manifest(routed), 3)
    menu[AUTO] = replace(menu[AUTO], price=price)
    rungs, chances = menu[AUTO].rungs, [*chances, 1.0]

    def loss(level, chance):
        costs = {(rung.visual_ratio, rung.skipped_layers, rung.passed_layers): rung.cost for rung in rungs}
        return 1 - chance + price * costs[level.visual_ratio, level.skipped_layers, level.passed_layers]

    level, chance = worthwhile_level(menu, chances)
    assert level.name in ("off", *PRUNED)
    if level.name != "off":
        assert level == menu[level.name].settled(chances)[0], "forcing it gives the same"
    assert loss(level, chance) <= min(loss(menu["off"], 1.0), *(loss(*menu[name].settled(chances)) for name in PRUNED)) + 1e-5


@pytest.mark.parametrize(("price", "chosen"), [(100.0, PRUNED[0]), (0.0, "off")])
def test_auto_says_what_it_chose_and_forcing_that_gives_the_same_answer(routed, price, chosen):
    engine = new_engine(load(routed))
    expect(engine.router, RISING)
    engine.menu[AUTO] = replace(engine.menu[AUTO], price=price)
    _, reader = submit(engine, 0, level=AUTO)
    drain(engine)
    receipt = reader.finished.receipt
    assert receipt.level == chosen
    assert receipt.reason.startswith("auto: ")
    assert chosen == "off" or f"{chosen} keeps this answer with an expected chance of" in receipt.reason
    forced = answer(engine, 0, level=chosen)
    assert reader.answer == forced.answer
    assert receipt.visual_tokens == forced.finished.receipt.visual_tokens
    count = engine.metrics.registry.get_sample_value("espalier_degradations_total", {"from": AUTO, "to": chosen})
    assert count == 1


@pytest.mark.parametrize(("later", "chosen"), [(False, PRUNED[0]), (True, "off")])
def test_auto_has_a_price_of_its_own_for_a_question_that_follows_others(routed, later, chosen):
    engine = new_engine(load(routed))
    expect(engine.router, RISING)
    engine.menu[AUTO] = replace(engine.menu[AUTO], price=100.0, later_price=0.0)
    request = replace(ask(engine, level=AUTO), later=later)
    engine.submit(request)
    drain(engine)
    assert request.emit.finished.receipt.level == chosen


@pytest.mark.parametrize("level", [AUTO, "strong"])
def test_a_level_that_chooses_gives_back_the_memory_that_it_does_not_need(routed, level):
    engine = new_engine(load(routed))
    expect(engine.router, [0.99] * RUNGS)
    engine.menu[AUTO] = replace(engine.menu[AUTO], price=100.0)
    submit(engine, 0, level=level, max_tokens=4)
    engine.step()
    assert engine.scheduler.used == engine.kv.used < VISUAL * 3
    drain(engine)


def test_auto_is_as_careful_as_the_hardest_picture_asks_for(routed):
    checkpoint = load(routed)
    router = load_router(checkpoint)
    pictures = [ask(new_engine(checkpoint), (number,)).images[0].pixels[None] for number in range(3)]
    features = [checkpoint.model.vision(pixels) for pixels in pictures]
    one_by_one = [read_request(router, checkpoint.model, [image], [40, 41]).chances for image in features]
    together = read_request(router, checkpoint.model, features, [40, 41]).chances
    torch.testing.assert_close(torch.tensor(together), torch.tensor(one_by_one).amin(0))


def test_mixed_with_other_levels_auto_answers_as_it_would_alone(routed):
    engine = new_engine(load(routed, dtype="float32"))
    expect(engine.router, RISING)
    engine.menu[AUTO] = replace(engine.menu[AUTO], price=100.0)
    alone = [answer(engine, number, level=level).answer for number, level in enumerate((AUTO, "off", "light"))]
    together = [submit(engine, number, level=level)[1] for number, level in enumerate((AUTO, "off", "light"))]
    drain(engine)
    assert [reader.answer for reader in together] == alone


@pytest.mark.parametrize("level", ["balanced", AUTO])
def test_scores_that_are_not_finite_send_the_request_to_level_off(routed, level):
    engine = new_engine(load(routed))
    expected = answer(engine, 0, level="off")
    engine.router.look.bias.fill_(torch.nan)
    request, reader = submit(engine, 0, level=level)
    drain(engine)
    assert reader.answer == expected.answer
    assert (reader.finished.receipt.level, request.reason) == ("off", f"the router failed at level {level}")
    count = engine.metrics.registry.get_sample_value("espalier_degradations_total", {"from": level, "to": "off"})
    assert count == 1
    with pytest.raises(RouterFailed):
        read_request(engine.router, engine.model, [engine.model.vision(request.images[0].pixels[None])], [5])


def test_what_is_written_and_not_finite_fails_the_router(routed):
    checkpoint = load(routed)
    router = load_router(checkpoint)
    router.write.out.bias.fill_(torch.nan)
    image = ImageFeatures(torch.randn(1, VISUAL, 48), torch.rand(1, VISUAL))
    with pytest.raises(RouterFailed, match="what the router wrote"):
        read_request(router, checkpoint.model, [image], [5]).keep(0, 3)


def test_inspect_shows_what_there_is_to_choose_from(routed):
    shown = CliRunner().invoke(app, ["inspect", str(routed)])
    assert shown.exit_code == 0, shown.output
    assert "The router's ladder" in shown.output
    assert f"│ {VISUAL} " in shown.output.split("ladder")[1]


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
