"""How a router is taught: what it is shown, the gradient through the frozen model, what it is trusted with, kills and refusals."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest
from transformers import LlavaForConditionalGeneration

from models.checkpoint import load, open_transformers
from models.manifest import read_manifest
from models.route import Route
from models.run_state import RunState, RunStateError
from pruning.dynamic.levels import PRUNED, Level, Rung, choose, make_route
from pruning.dynamic.router import Router, Shape, read_request
from pruning.dynamic.router_file import RouterRecord
from pruning.dynamic.training import agreement, dataset, loop, profile, train
from pruning.dynamic.training.agreement import BUDGETS, auto, budgets, price_of
from pruning.dynamic.training.config import Lesson
from pruning.dynamic.training.dataset import LEFT_OVER, Watched
from pruning.dynamic.training.distill import divergence
from pruning.dynamic.training.profile import as_asked
from pruning.dynamic.training.teacher import Asked, answers, gives, margins, observe, passing_costs, said
from pruning.dynamic.training.train import run
from pruning.samples import DataError
from tests.pruning.dynamic.tiny_router import QUICK, plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.pruning.kills import Killed, die_at
from tests.server.tiny import LAYERS, VISUAL, answer, ask, new_engine


def question(checkpoint, text="What color is the star?", picture=0):
    request = ask(new_engine(checkpoint), (picture,), text)
    return Asked(request.prompt, checkpoint.model.vision(request.images[0].pixels[None]).tokens[0])


# ---- what is watched


def test_the_gaze_is_the_most_attention_that_transformers_computes(plain):
    checkpoint = load(plain)
    asked, own = [question(checkpoint), question(checkpoint, "How many?", 1)], [[40, 41, 42], [43, 44]]
    reference = LlavaForConditionalGeneration.from_pretrained(plain, attn_implementation="eager")
    said_, gazes = observe(checkpoint.model, asked, own)
    for number, (one, made) in enumerate(zip(asked, own, strict=True)):
        ids = torch.tensor([[*one.prompt, *made[:-1]]])
        pixels = ask(new_engine(checkpoint), (number,)).images[0].pixels[None]
        with torch.no_grad():
            out = reference(input_ids=ids, pixel_values=pixels, output_attentions=True)
        visual = (ids[0] == reference.config.image_token_id).nonzero()[:, 0]
        after = torch.arange(int(visual[-1]) + 1, ids.shape[1])
        wanted = torch.cat(out.attentions)[:, :, after][..., visual].amax((0, 1, 2))
        torch.testing.assert_close(gazes[number], wanted, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(said_[number], out.logits[0, -len(made) :].log_softmax(-1), rtol=1e-3, atol=1e-3)


def test_answers_are_what_the_engine_says_at_level_off(plain):
    checkpoint = load(plain)
    asked = [question(checkpoint, picture=i) for i in range(2)]
    made = answers(checkpoint.model, asked, checkpoint.eos, 6)
    decode = checkpoint.preprocessor.tokenizer.decode
    for number, tokens in enumerate(made):
        assert decode(tokens).strip() == answer(new_engine(checkpoint), number, max_tokens=6).text.strip()


def test_what_passing_a_layer_by_costs_is_the_divergence_of_that_route(plain):
    checkpoint = load(plain)
    asked, own = [question(checkpoint)], [[40, 41, 42]]
    dense, _ = observe(checkpoint.model, asked, own)
    costs = passing_costs(checkpoint.model, asked, own, dense)
    assert costs.isnan().tolist() == [[True, False, True]]
    (passed,) = said(checkpoint.model, asked, own, [Route(VISUAL, tuple(range(VISUAL)), (True,) * 3, frozen_layers=frozenset({1}))])
    wanted = (dense[0].exp() * (dense[0] - passed)).sum()
    torch.testing.assert_close(costs[0, 1], wanted, rtol=1e-3, atol=1e-4)
    assert wanted > 0


def test_a_margin_is_by_how_much_the_next_token_is_behind(plain):
    checkpoint = load(plain)
    asked, full = [question(checkpoint)], [Route.full(VISUAL, LAYERS)]
    made = answers(checkpoint.model, asked, checkpoint.eos, 3)
    (tokens,) = said(checkpoint.model, asked, made, full)
    first, second = tokens.topk(2).values.T
    assert margins(checkpoint.model, asked, made, full) == pytest.approx([float((first - second).min())])
    another = [[*made[0][:-1], int(tokens[-1].argmin())]]
    assert margins(checkpoint.model, asked, another, full)[0] < 0
    assert gives(checkpoint.model, asked * 2, made + another, full * 2) == [True, False]


@pytest.fixture(scope="module", name="watched")
def watched_lesson(plain, tmp_path_factory) -> Watched:
    work = RunState(tmp_path_factory.mktemp("watched") / "out", {}, "")
    with train.Progress(disable=True) as progress:
        return dataset.watch(Lesson(**{**QUICK, "data": "world", "questions": 4}), load(plain), work, progress)


def test_a_quarter_of_the_questions_follows_one_in_the_same_chat_with_the_models_own_answer(plain, watched):
    decode = load(plain).preprocessor.tokenizer.decode
    texts = [decode(text[text >= 0]) for text in watched.text[watched.picture == 0]]
    assert [text.count("ASSISTANT") for text in texts] == [1, 1, 1, 2]
    spoken = decode(watched.answer[0][watched.answer[0] >= 0], skip_special_tokens=True).strip()
    assert spoken in texts[3]
    assert texts[0].removesuffix(" ASSISTANT:").removeprefix("<s>") in texts[3]
    assert watched.later[watched.picture == 0].tolist() == [False, False, False, True]


def test_of_a_picture_that_is_held_out_every_question_is_asked_alone_and_all_but_the_first_again_later(plain, watched):
    decode = load(plain).preprocessor.tokenizer.decode
    held = watched.picture == QUICK["pictures"] - 1
    texts = [decode(text[text >= 0]) for text in watched.text[held]]
    assert watched.later[held].tolist() == [False] * 4 + [True] * 3
    for number, text in enumerate(texts[4:]):
        assert text.endswith(texts[number + 1].removeprefix("<s>USER: \n"))
        assert texts[number].removesuffix(" ASSISTANT:") in text


def test_likely_tokens_and_the_rest_are_a_distribution(watched):
    there = watched.answer >= 0
    torch.testing.assert_close(watched.likely[there].exp().sum(-1), torch.ones(int(there.sum())), rtol=1e-3, atol=1e-3)
    assert torch.equal(watched.alternatives[there][:, 0].long(), watched.answer[there]), "the model says what it finds most likely"


# ---- the gradient through the frozen model


@pytest.mark.parametrize(("keep", "passed"), [(VISUAL, 0), (VISUAL, 1), (20, 0), (20, 1)])
def test_the_divergence_that_is_learned_from_is_that_of_the_route_that_is_served(plain, watched, keep, passed):
    """Through transformers' model while learning, through the packed forward when serving: merged, sized, passed by alike."""
    checkpoint = load(plain)
    torch.manual_seed(1)
    router = Router(Shape(48, LAYERS, 16)).requires_grad_(False)
    if keep < VISUAL:  # where all stay, serving writes nothing
        torch.nn.init.normal_(router.write.out.weight, std=0.3)
    teacher = open_transformers(plain).model
    teacher.set_attn_implementation("eager")
    asked = watched.of(torch.arange(5))
    learned = divergence(router, teacher, asked, keep, passed)
    served = torch.stack([
        _served(checkpoint, router, watched, number, keep, passed) for number in range(5)
    ])
    torch.testing.assert_close(learned, served.clamp_max(20), rtol=2e-2, atol=2e-3)
    if (keep, passed) == (VISUAL, 0):
        assert learned.abs().max() < 2e-3
    else:
        assert learned.max() > 0.01


def _served(checkpoint, router, watched, number, keep, passed):
    """KL over the likely tokens and the rest, from our own forward."""
    asked, read, own = as_asked(watched, number, checkpoint.model.config.image_token_id)
    reading = read_request(router, checkpoint.model, [asked.image], read)
    level = Level("some", "", keep / VISUAL, passed_layers=passed)
    route, visual = make_route(level, [asked.image], LAYERS, None, "router", 0, reading)
    assert (len(route.kept_tokens), len(route.frozen_layers)) == (keep, passed)
    (found,) = said(checkpoint.model, [Asked(asked.prompt, visual)], [own], [route])
    count = len(own)
    here = found.gather(-1, watched.alternatives[number, :count].long())
    rest = torch.log1p(-here.exp().sum(-1, keepdim=True).clamp_max(1 - LEFT_OVER))
    likely = watched.likely[number, :count]
    return (likely.exp() * (likely - torch.cat([here, rest], -1))).sum()


def test_learning_to_write_lowers_the_divergence(plain, watched):
    torch.manual_seed(0)
    router = Router(Shape(48, LAYERS, 16))
    teacher = open_transformers(plain).model.requires_grad_(False)
    teacher.set_attn_implementation("eager")
    asked = watched.of(torch.arange(12))
    optimizer = torch.optim.AdamW(router.write.parameters(), 3e-3)
    course = []
    for _ in range(40):
        loss = divergence(router, teacher, asked, 12, 0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        course.append(float(loss.detach()))
    assert course[-1] < 0.7 * course[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- what it is trusted with


def test_networks_find_what_separates_and_say_how_sure_they_are():
    generator = torch.Generator().manual_seed(0)
    features = 5 + 3 * torch.randn(3000, 4, generator=generator)
    chances = torch.stack([(features[:, 1] - 5).sigmoid(), ((features[:, 2] - 5) * (features[:, 3] - 5) / 3).sigmoid()], 1)
    happened = (torch.rand(3000, 2, generator=generator) < chances).float()
    before = torch.random.get_rng_state()
    found = agreement.fit(features[:2000], happened[:2000])
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (found(features[2000:]).sigmoid() - chances[2000:]).abs().mean() < 0.1
    assert torch.equal(agreement.fit(features[:2000], happened[:2000])(features), found(features))


LADDER = [Rung(share, 0, 0, share) for share in (0.1, 0.3, 0.6, 1.0)]


@pytest.fixture(name="judged", scope="module")
def judged_answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Chances on each rung, and answers that stay as often as they say."""
    generator = torch.Generator().manual_seed(0)
    chances = torch.rand(500, 3, generator=generator).sort(1).values
    kept = torch.rand(500, 3, generator=generator) < chances
    return torch.nn.functional.pad(chances, (0, 1), value=1.0), torch.nn.functional.pad(kept, (0, 1), value=True)


def test_levels_spend_their_budgets_and_no_less_than_they_must(judged):
    levels, trade = budgets(*judged, LADDER)
    for name, budget in BUDGETS.items():
        assert levels[name]["flops_ratio"] <= budget
        assert levels[name]["flops_ratio"] > budget - 0.02
    spent = [entry["flops_ratio"] for entry in trade["tokens and layers"]]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > 0.9
    assert spent[-1] == pytest.approx(0.1)


def test_the_price_of_a_budget_spends_it(judged):
    _, trade = budgets(*judged, LADDER)
    for budget in (0.2, 0.45, 0.7):
        price = price_of(trade["tokens"], "flops_ratio", budget)
        taken = choose(judged[0], torch.tensor([rung.cost for rung in LADDER]), price)
        assert torch.tensor([rung.cost for rung in LADDER])[taken].mean() == pytest.approx(budget, abs=0.03)


def test_layers_stay_out_of_the_trade_in_tokens(judged):
    passing = [replace(rung, passed_layers=2) for rung in LADDER[:2]] + LADDER[2:]
    _, trade = budgets(*judged, passing)
    assert min(entry["visual_ratio"] for entry in trade["tokens"]) == pytest.approx(0.6)
    assert min(entry["visual_ratio"] for entry in trade["tokens and layers"]) == pytest.approx(0.1)


def test_where_no_rung_keeps_anything_auto_runs_the_whole_model():
    chances, kept = torch.zeros(10, 4), torch.zeros(10, 4, dtype=torch.bool)
    chances[:, 3], kept[:, 3] = 1.0, True
    found = auto(chances, kept, torch.arange(10) < 5, LADDER, budgets(chances, kept, LADDER)[0], 0.99)
    for kind in ("first", "later"):
        assert (found[kind]["agreement"], found[kind]["visual_ratio"]) == (1.0, 1.0)


@pytest.mark.parametrize("target", [0.8, 0.9, 0.99])
def test_autos_prices_keep_more_than_the_share_that_is_asked_for_of_first_and_later_questions(judged, target):
    """The later ones are harder: at the price of the others they would be answered worse. Of 500 answers it takes a few more than
    the share to be sure of it."""
    chances, kept = judged
    less = torch.tensor([0.7, 0.7, 0.7, 1.0])
    harder, stays = chances * less, kept & (torch.rand(kept.shape, generator=torch.Generator().manual_seed(1)) < less)
    later = torch.arange(1000) >= 500
    found = auto(torch.cat([chances, harder]), torch.cat([kept, stays]), later, LADDER, budgets(*judged, LADDER)[0], target)
    for kind in ("first", "later"):
        assert found[kind]["questions"] == 500
        stayed = round(500 * found[kind]["agreement"])
        assert binomtest(stayed, 500, target, "greater").pvalue < 0.06
        assert stayed < 500 * target + 30, "and not many more"
    assert found["first"]["flops_ratio"] < found["later"]["flops_ratio"] <= LADDER[-1].cost


def test_where_no_question_follows_another_both_prices_are_one(judged):
    found = auto(*judged, torch.zeros(500, dtype=torch.bool), LADDER, budgets(*judged, LADDER)[0], 0.9)
    assert found["first"] == found["later"]


def test_the_manifest_says_what_was_measured_and_what_auto_keeps(routed):
    record = RouterRecord.of(read_manifest(routed))
    assert set(record.levels) == set(PRUNED)
    assert len(record.rungs) == len(record.measured["agreement"]) == record.shape["rungs"] + 1
    assert [rung["cost"] for rung in record.rungs] == sorted(rung["cost"] for rung in record.rungs)
    assert record.measured["agreement"][-1] == 1.0, "the whole model agrees with itself"
    for kind, each in (("first", QUICK["questions"]), ("later", QUICK["questions"] - 1)):
        assert record.auto[kind]["questions"] == each * (QUICK["pictures"] // 3)
        assert 0 <= record.auto[kind]["agreement"] <= 1
        assert record.auto[kind]["price"] > 0


# ---- training


@pytest.mark.parametrize(
    ("owner", "name", "call", "left"),
    [(dataset, "_watch", 2, 1), (train, "foresight_error", 25, 10), (train, "writing_error", 12, 10), (profile, "clearness", 2, 3),
     (train, "derive", 1, 1)],
)  # fmt: skip
def test_a_killed_run_goes_on_and_ends_as_one_that_never_stopped(
    plain, routed, tmp_path, monkeypatch, owner, name, call, left
):
    monkeypatch.setattr(loop, "SAVE_EVERY", 10)
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, call)
        with pytest.raises(Killed):
            run(Lesson(**QUICK), plain, tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()
    again = die_at(monkeypatch, owner, name, -1)
    run(Lesson(**QUICK), plain, tmp_path / "out", quiet=True)
    assert again[0] == left
    assert read_manifest(tmp_path / "out").files == read_manifest(routed).files
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_another_lesson_does_not_go_on_with_a_killed_run(plain, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die_at(patch, dataset, "_watch", 2)
        with pytest.raises(Killed):
            run(Lesson(**QUICK), plain, tmp_path / "out", quiet=True)
    with pytest.raises(RunStateError, match="unfinished run of another recipe"):
        run(Lesson(**QUICK, seed=1), plain, tmp_path / "out", quiet=True)


def test_it_learns_from_a_file_without_answers(plain, tmp_path):
    lines = []
    for number in range(8):
        shutil.copy("docs/samples/sign.png", tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "What is written?"}))
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(lines))
    lesson = Lesson(data=str(data), pictures=8, questions=1, answer=3, steps=2, writing=2, batch=2)
    record = RouterRecord.of(run(lesson, plain, tmp_path / "out", quiet=True))
    assert record.report["questions"] == 8
    with pytest.raises(DataError, match="has 8 samples and 9 are asked for"):
        run(lesson.model_copy(update={"pictures": 9}), plain, tmp_path / "more", quiet=True)


def test_what_cannot_be_done_is_said_before_the_work(plain, tmp_path):
    with pytest.raises(ValueError, match="exists; name a directory that does not"):
        run(Lesson(), plain, tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"none\.jsonl is not a file"):
        run(Lesson(data="none.jsonl"), plain, tmp_path / "out", quiet=True)


