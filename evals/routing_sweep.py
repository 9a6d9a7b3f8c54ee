"""What routes cost in accuracy: policies at equal arithmetic, and the levels; `make tables` shows what is stored.

`python -m evals.routing_sweep policies embedded` and `... levels embedded` write one JSON line a run, as it ends. What is stored
already is not run again. All answers are scored by `evals.exact_match.matches`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, groupby
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from checkpoints.shipped import resolve
from evals import baselines
from evals.exact_match import DRAW, RESAMPLES, Scene, matches, summary
from evals.exam import MAX_TOKENS
from evals.runs import store, stored
from models.checkpoint import Checkpoint, load
from models.flops import flops_ratio
from models.llava import Llava
from models.route import Route
from models.vision.features import ImageFeatures
from pruning.answers import Prompt, generate
from pruning.dynamic.levels import AUTO, Level, OperatingPoint, layers_to_run
from pruning.dynamic.planner import Plan, Planner, join, make_route
from pruning.dynamic.router import RequestRouting, Router, RouterConfig, score_request, text_window
from pruning.dynamic.router_file import RouterRecord, load_router
from pruning.samples import FAMILIES, WORLD

SHUFFLED = "router, another's question"
"""The router reads a question about the next picture: what its scores owe to the question."""
LAYERS = "router and layers"
"""Layers may be frozen for visual tokens as well, those that the router predicts to cost least."""
SAME = "router, as much for each question"
"""What it is worth that questions are given what they need: the same number of tokens for all of them."""
ELASTIC = ("router", LAYERS, SHUFFLED)
ROUTED = (*ELASTIC, SAME)
POLICIES = (*ROUTED, *baselines.TOKEN_BASELINES, "fastv", "layers")
BUDGETS = (0.62, 0.56, 0.47, 0.46)
"""Shares of the dense prefill's FLOPs: PAR's operating points on LLaVA-1.5-7B (arXiv 2412.06458, table 1)."""
SHARES = (1 / 3, 2 / 9, 1 / 9)
"""Of the visual tokens."""
FIXED_SHARES = (2 / 3, 7 / 12, 1 / 2, 1 / 3)
"""Of the visual tokens, for all questions alike: budgets against which `auto` has to be worth it. All layers run, for where three
eighths are frozen fewer than 98 of 100 answers stay, however many tokens do."""
TYPICAL_TEXT = 16
"""Text tokens of a typical prompt, by which a budget becomes a number of tokens."""

app = typer.Typer(no_args_is_help=True)
console = Console(stderr=True)
CHECKPOINT = Annotated[str, typer.Argument(help="A directory, embedded, embedded-dense or smol.")]
NAME = Annotated[str | None, typer.Option(help="What the checkpoint is called in the table.")]
PICTURES = Annotated[int, typer.Option(min=1, help="All of their questions are asked, about nine each.")]
SPLIT = Annotated[str, typer.Option(help="test to report, validation to tune.")]
SEED = Annotated[int, typer.Option(help="Of the router, and of the random policy.")]
RUNS = Annotated[Path, typer.Option(help="Where results are kept, one JSON line a run.")]
DEVICE = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
DTYPE = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]


def questions(checkpoint: Checkpoint, scene: Scene, visual: Tensor) -> tuple[list[Prompt], list[list[int]]]:
    """All of a picture's questions, and the tokens of their right answers."""
    answered = [checkpoint.preprocessor.answered(question.text, question.answer) for question in scene.questions]
    return [Prompt(prompt, visual) for prompt, _, _ in answered], [said + end for _, said, end in answered]


def drawn_by(checkpoint: Checkpoint) -> str:
    """Who draws its questions: WORLD or THINGS."""
    return checkpoint.manifest.trained_on or WORLD


def encode(checkpoint: Checkpoint, scene: Scene, patch_ratio: float = 1.0) -> ImageFeatures:
    picture = checkpoint.preprocessor.picture(scene.image)
    return checkpoint.model.encode(picture.pixels, picture.layout, patch_ratio)


def score(router: Router, model: Llava, prompt: Prompt, image: ImageFeatures) -> RequestRouting:
    return score_request(router, model, [image], text_window(prompt.ids, model.config.image_token_id))


# ---- policies


@dataclass(frozen=True)
class Setting:
    """A policy, how many visual tokens it keeps and layers it skips; or the cost weight at which a router spends the budget on
    average."""

    policy: str
    budget: str
    keep: int
    skip: int = 0
    cost_weight: float = 0.0


def settings(checkpoint: Checkpoint, router: Router | None) -> Iterator[Setting]:
    """Every policy at every budget: the most tokens, or layers, that it can afford."""
    model = checkpoint.model
    total = model.visual_tokens_per_image
    yield Setting("off", "off", total)
    for policy in POLICIES:
        if policy in ROUTED and router is None:
            continue
        if policy in ELASTIC:
            yield from _elastic(checkpoint, policy)
            continue
        layers = [(total, skip) for skip in range(model.num_layers - 1)]
        choices = layers if policy == "layers" else [(keep, 0) for keep in range(total, 0, -1)]
        config = router.config if router and policy == SAME else None
        for budget in BUDGETS:
            affordable = (
                Setting(policy, f"{budget:.0%} FLOPs", keep, skip) for keep, skip in choices
                if _typical_ratio(model, config, policy, keep, skip) <= budget
            )  # fmt: skip
            if best := next(affordable, None):
                yield best
        for share in SHARES if policy != "layers" else ():
            yield Setting(policy, f"{share:.3f} of the tokens", round(total * share))


def _elastic(checkpoint: Checkpoint, policy: str) -> Iterator[Setting]:
    """A router's budgets at the cost weights that spent them on the pictures which it was profiled on."""
    record, total = RouterRecord.of(checkpoint.manifest), checkpoint.model.visual_tokens_per_image
    assert record is not None
    bought = [one.model_dump() for one in record.cost_weight_sweep["tokens and layers" if policy == LAYERS else "tokens"]]
    for budget in BUDGETS:
        weight = cost_weight_for(bought, "flops_ratio", budget)
        yield Setting(policy, f"{budget:.0%} FLOPs", total, cost_weight=weight)
    for share in SHARES if policy != LAYERS else ():
        weight = cost_weight_for(bought, "visual_ratio", share)
        yield Setting(policy, f"{share:.3f} of the tokens", total, cost_weight=weight)


def cost_weight_for(bought: Sequence[dict[str, float]], what: str, budget: float) -> float:
    """The cost weight at which `what` (flops_ratio or visual_ratio) is `budget` on average; between a sweep's, in proportion."""
    spent = np.minimum.accumulate([entry[what] for entry in bought])  # less and less as the weight rises
    return float(np.exp(np.interp(-budget, -spent, [np.log(entry["cost_weight"]) for entry in bought])))


def _typical_ratio(model: Llava, router: RouterConfig | None, policy: str, keep: int, skip: int) -> float:
    """FLOPs ratio for a prompt of typical length."""
    total = model.visual_tokens_per_image
    if policy == "fastv":
        return baselines.fastv_ratio(model, total + TYPICAL_TEXT, keep)
    route = Route(total, tuple(range(keep)), tuple(layer >= skip for layer in range(model.num_layers)))
    return flops_ratio(model.config, route, total + TYPICAL_TEXT, router.flops(total, TYPICAL_TEXT, keep) if router else 0)


def point_of(setting: Setting, points: Sequence[OperatingPoint], routing: RequestRouting) -> OperatingPoint:
    """The operating point of one question; of those that leave out tokens alone, unless layers are asked for."""
    if setting.policy == SAME:
        return OperatingPoint(setting.keep / routing.visual.shape[1])
    allowed = [
        (point, expected) for point, expected in zip(points, routing.expected_agreement, strict=True)
        if setting.policy == LAYERS or not (point.frozen_layers or point.skipped_layers)
    ]  # fmt: skip
    level = Level("", "", 1.0, tuple(point for point, _ in allowed), setting.cost_weight)
    return level.choose([expected for _, expected in allowed])[0]


@torch.inference_mode()
def ask(
    setting: Setting, checkpoint: Checkpoint, image: ImageFeatures, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]],
    routings: Sequence[RequestRouting], seed: int,
) -> tuple[list[bool], list[tuple[float, float]]]:  # fmt: skip
    """Whether each question about a picture is answered right; its FLOPs ratio, and the share of the visual tokens that it kept.
    `routings` are of the questions, where a router chooses."""
    model, change = checkpoint.model, checkpoint.manifest.layer_change
    total = len(prompts[0].visual)
    if setting.policy == "fastv":
        said = [_fastv(model, *pair, setting.keep) for pair in zip(prompts, answers, strict=True)]
        spent = [(baselines.fastv_ratio(model, len(prompt.ids), setting.keep), setting.keep / total) for prompt in prompts]
        return [found == list(answer) for found, answer in zip(said, answers, strict=True)], spent
    if routings:
        record = RouterRecord.of(checkpoint.manifest)
        points = record.operating_points if record else ()
        made = [make_route(point_of(setting, points, one), [image], model.num_layers, change, one) for one in routings]
    elif setting.policy in ("off", "layers"):
        runs = layers_to_run(model.num_layers, setting.skip, change)
        made = [(replace(Route.full(total, model.num_layers), layers=runs), image.tokens[0])] * len(prompts)
    else:
        kept = baselines.keep_tokens(setting.policy, image, setting.keep, seed)
        made = [join([kept], (True,) * model.num_layers)] * len(prompts)
    routes = [route for route, _ in made]
    own = [one.flops(len(route.kept_tokens)) for one, route in zip(routings, routes, strict=False)] or [0] * len(prompts)
    spent = [
        (flops_ratio(model.config, route, len(prompt.ids), flops), len(route.kept_tokens) / total)
        for prompt, route, flops in zip(prompts, routes, own, strict=True)
    ]
    used = [Prompt(prompt.ids, visual) for prompt, (_, visual) in zip(prompts, made, strict=True) if visual is not None]
    return matches(model, used, answers, routes), spent


def _fastv(model: Llava, prompt: Prompt, answer: Sequence[int], keep: int) -> list[int]:
    """What the model says at each place of `answer`."""
    ids = torch.tensor([*prompt.ids, *answer[:-1]], device=model.device)
    logits, _ = baselines.fastv(model, ids, prompt.visual, keep, len(answer))
    said: list[int] = logits.argmax(-1).tolist()
    return said


def run_policy(
    asked: Sequence[Setting], checkpoint: Checkpoint, router: Router | None, pictures: int, split: str, seed: int
) -> list[dict[str, Any]]:
    """All of a policy's budgets in one pass over the pictures, each of which is drawn, encoded and scored once."""
    data = drawn_by(checkpoint)
    found: list[dict[str, list[list[bool]]]] = [{family: [] for family in FAMILIES[data]} for _ in asked]
    ratios: list[list[tuple[float, float]]] = [[] for _ in asked]
    policy = asked[0].policy
    for index in track(range(pictures), policy, console=console, transient=True):
        scene = DRAW[data](split, index)
        image = encode(checkpoint, scene)
        prompts, answers = questions(checkpoint, scene, image.tokens[0])
        read: Iterable[Prompt] = prompts
        if policy == SHUFFLED:
            read = cycle(questions(checkpoint, DRAW[data](split, index + 1), image.tokens[0])[0])
        routings = []
        if router and policy in ROUTED:
            routings = [score(router, checkpoint.model, one, image) for one, _ in zip(read, prompts, strict=False)]
        for number, setting in enumerate(asked):
            right, spent = ask(setting, checkpoint, image, prompts, answers, routings, seed + index)
            found[number][scene.family].append(right)
            ratios[number] += spent
    means = [[round(mean(column), 4) for column in zip(*spent, strict=True)] for spent in ratios]
    return [
        summary(answered) | {"flops_ratio": flops, "visual_ratio": kept}
        for answered, (flops, kept) in zip(found, means, strict=True)
    ]


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("checkpoint", "policy", "budget", "split", "seed"))


@app.command()
def policies(
    checkpoint: CHECKPOINT, runs: RUNS = Path("docs/runs/routes.jsonl"), name: NAME = None, pictures: PICTURES = 480,
    split: SPLIT = "test", seed: SEED = 0, device: DEVICE = "cpu", dtype: DTYPE = "auto",
    only: Annotated[str, typer.Option(help="Only settings whose policy and budget contain this text.")] = "",
) -> None:  # fmt: skip
    """Every way of choosing visual tokens and layers, at the same budgets."""
    source = load(resolve(checkpoint), device, dtype)
    router = load_router(source)
    done = {key(entry) for entry in stored(runs)}
    for policy, budgets in groupby(settings(source, router), key=lambda setting: setting.policy):
        common = {"checkpoint": name or checkpoint, "policy": policy, "split": split, "seed": seed}
        asked = [
            one for one in budgets
            if key(common | {"budget": one.budget}) not in done and only in f"{policy}, {one.budget}"
        ]  # fmt: skip
        if not asked:
            continue
        started = time.monotonic()
        results = run_policy(asked, source, router, pictures, split, seed)
        seconds = round((time.monotonic() - started) / len(asked), 1)
        entries = [common | asdict(setting) | result | {"seconds": seconds} for setting, result in zip(asked, results, strict=True)]
        store(runs, entries)
        for entry in entries:
            typer.echo(f"{policy}, {entry['budget']}, {entry['visual_ratio']:.1%} of the tokens: {entry['accuracy']:.2%} "
                       f"at {entry['flops_ratio']:.1%} of the FLOPs in {seconds:.0f} s")  # fmt: skip


# ---- levels


@dataclass
class Column:
    """One level's answers, by picture: how many agreed, were right, were asked, and their FLOPs ratios summed."""

    counts: list[tuple[float, float, float, float]] = field(default_factory=list)

    def add(self, agreed: Sequence[bool], right: Sequence[bool], ratios: Sequence[float]) -> None:
        self.counts.append((sum(agreed), sum(right), len(agreed), sum(ratios)))

    def shares(self, drawn: np.ndarray | None = None) -> np.ndarray:
        """Agreement, accuracy and mean FLOPs ratio; of pictures `drawn` [resamples, pictures], one row each."""
        counts = np.array(self.counts)
        sums = counts.sum(0) if drawn is None else counts[drawn].sum(1)
        return np.stack([sums[..., 0], sums[..., 1], sums[..., 3]], -1) / sums[..., 2:3]


Columns = dict[tuple[str, str], Column]
"""By place in the chat, `first` or `follow_up`, and by level."""
Chat = tuple[list[Prompt], list[list[int]], list[list[int]]]
"""Questions about one picture, the model's own answers, and the right ones."""


def chats(checkpoint: Checkpoint, scene: Scene, visual: Tensor) -> dict[str, Chat]:
    """The picture's questions, each first in a chat, and each after the one before it with the model's own answer."""
    preprocessor, decode = checkpoint.preprocessor, checkpoint.preprocessor.tokenizer.decode
    first, right = questions(checkpoint, scene, visual)
    own = generate(checkpoint.model, first, checkpoint.eos, MAX_TOKENS)
    asked = [question.text for question in scene.questions]
    turns = [(text, decode(answer, skip_special_tokens=True).strip()) for text, answer in zip(asked, own, strict=True)]
    before = [turns[-1], *turns[:-1]]
    second = [Prompt(preprocessor.question(text, [turn]), visual) for text, turn in zip(asked, before, strict=True)]
    then = generate(checkpoint.model, second, checkpoint.eos, MAX_TOKENS)
    return {"first": (first, own, right), "follow_up": (second, then, right)}


def fixed_plan(planner: Planner, share: float, prompt: Prompt) -> Plan:
    """The router's tokens, but the same number for every question."""
    assert planner.router is not None
    model, point = planner.model, OperatingPoint(share)
    routing = score(planner.router, model, prompt, prompt.image)
    route, visual = make_route(point, [prompt.image], model.num_layers, None, routing)
    ratio = flops_ratio(model.config, route, len(prompt.ids), routing.flops(len(route.kept_tokens)))
    return Plan("fixed", "", route, visual, ratio)


def outcome(model: Llava, chat: Chat, plans: Sequence[Plan]) -> tuple[list[bool], list[bool], list[float]]:
    """Of each question as planned: whether its answer agrees, whether it is right, and its FLOPs ratio."""
    prompts, own, right = chat
    routes = [plan.route for plan in plans]
    used = [Prompt(prompt.ids, plan.visual) for prompt, plan in zip(prompts, plans, strict=True) if plan.visual is not None]
    agreed = matches(model, used, own, routes)
    correct = list(agreed)
    wrong = [i for i in range(len(own)) if own[i] != right[i]]  # of the others, to agree is to be right
    if wrong:
        again = matches(model, [used[i] for i in wrong], [right[i] for i in wrong], [routes[i] for i in wrong])
        for i, found in zip(wrong, again, strict=True):
            correct[i] = found
    return agreed, correct, [plan.flops_ratio for plan in plans]


def run_levels(checkpoint: Checkpoint, pictures: int, split: str) -> dict[str, Any]:
    """Every level of the menu, first in a chat and following up, and fixed budgets for first questions."""
    planner = Planner(checkpoint)
    menu, fixed = list(planner.menu), {f"{share:.3f} of the tokens": share for share in FIXED_SHARES}
    ratios = {1.0, *(level.patch_ratio for level in planner.menu.values())}
    data = drawn_by(checkpoint)
    columns: Columns = defaultdict(Column)
    for index in track(range(pictures), "asking", console=console):
        scene = DRAW[data](split, index)
        seen = {ratio: encode(checkpoint, scene, ratio).tokens for ratio in ratios}
        for place, chat in chats(checkpoint, scene, seen[1.0][0]).items():
            for level in menu:
                image = ImageFeatures(seen[planner.menu[level].patch_ratio])
                plans = [planner.plan(level, "", p.ids, [image], follow_up=place == "follow_up") for p in chat[0]]
                columns[place, level].add(*outcome(planner.model, chat, plans))
            for name, share in fixed.items() if place == "first" else ():
                plans = [fixed_plan(planner, share, prompt) for prompt in chat[0]]
                columns[place, name].add(*outcome(planner.model, chat, plans))
    levels: dict[str, dict[str, Any]] = defaultdict(dict)
    for (place, level), column in columns.items():
        levels[place][level] = share_summary(column)
    auto = planner.menu[AUTO]
    named = [level for level in menu if level not in ("off", AUTO)]
    return {
        "levels": dict(levels), "against_fixed": against(columns, list(fixed)), "against_levels": against(columns, named),
        "follow_up_against_first": follow_up_against_first(columns), "cost_weights": [auto.cost_weight, auto.follow_up_cost_weight],
    }  # fmt: skip


def _drawn(pictures: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, pictures, (RESAMPLES, pictures))


def share_summary(column: Column) -> dict[str, Any]:
    """Shares, with 95 % bootstrap intervals over pictures."""
    shares, drawn = column.shares(), column.shares(_drawn(len(column.counts)))
    return {**_named(("agreement", "accuracy", "flops_ratio"), shares, drawn), "n": int(sum(count[2] for count in column.counts))}


def _named(names: Sequence[str], found: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """What was found, by name, and the 95 % interval of what was `drawn` [resamples, names] behind each."""
    spread, named = np.quantile(drawn, (0.025, 0.975), axis=0), dict[str, Any]()
    for place, name in enumerate(names):
        named[name] = round(float(found[place]), 4)
        named[f"{name}_interval"] = [round(float(bound), 4) for bound in spread[:, place]]
    return named


def against(columns: Columns, names: Sequence[str]) -> dict[str, Any]:
    """The cheapest of the budgets with these `names`, or `off`, that agrees as often as `auto`; and the share of its FLOPs that
    `auto` saves, paired by picture."""
    auto = columns["first", AUTO]
    agreement, _, ratio = auto.shares()
    others = {name: columns["first", name] for name in ("off", *names)}
    equal = {name: column for name, column in others.items() if column.shares()[0] >= agreement}
    name = min(equal, key=lambda name: equal[name].shares()[2])
    drawn = _drawn(len(auto.counts))
    saved = 1 - auto.shares(drawn)[:, 2:] / equal[name].shares(drawn)[:, 2:]
    found = equal[name].shares()
    return {
        "level": name, "agreement": round(float(found[0]), 4), "flops_ratio": round(float(found[2]), 4),
        **_named(("saved",), 1 - ratio / found[2:], saved),
    }  # fmt: skip


def follow_up_against_first(columns: Columns) -> dict[str, Any]:
    """What it costs `auto` that a question follows another: how far its agreement and accuracy lie from those that `off` has there,
    less the same of first questions. With 95 % bootstrap intervals over pictures."""

    def gained(drawn: np.ndarray | None = None) -> np.ndarray:
        second, first = (
            columns[place, AUTO].shares(drawn) - columns[place, "off"].shares(drawn) for place in ("follow_up", "first")
        )
        return second - first

    return _named(("agreement", "accuracy"), gained(), gained(_drawn(len(columns["follow_up", AUTO].counts))))


@app.command()
def levels(
    checkpoint: CHECKPOINT, runs: RUNS = Path("docs/runs/levels.jsonl"), name: NAME = None, pictures: PICTURES = 480,
    split: SPLIT = "test", seed: SEED = 0, device: DEVICE = "cpu", dtype: DTYPE = "auto",
) -> None:  # fmt: skip
    """Every level, of first questions in a chat and of those that follow, against fixed budgets. Agreement is with the un-pruned
    model's own greedy answer in the same chat."""
    source = load(resolve(checkpoint), device, dtype)
    if source.manifest.router is None:
        raise typer.BadParameter(f"{checkpoint} has no router; train one with `espalier route`")
    entry: dict[str, Any] = {"checkpoint": name or checkpoint, "split": split, "seed": seed, "pictures": pictures}
    if any(entry.items() <= done.items() for done in stored(runs)):
        typer.echo("stored already")
        return
    started = time.monotonic()
    entry |= run_levels(source, pictures, split)
    entry["seconds"] = round(time.monotonic() - started, 1)
    store(runs, [entry])
    typer.echo(json.dumps(entry, indent=1))


if __name__ == "__main__":
    app()
