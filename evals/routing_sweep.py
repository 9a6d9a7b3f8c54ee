"""What each way of choosing visual tokens and layers costs in accuracy, at equal arithmetic; `make tables` shows what is stored.

`python -m evals.routing_sweep embedded --runs docs/runs/routes.jsonl`: one JSON line a run, written as a policy ends. What is
stored already is not run again. Exact match is read off one forward over the right answer, as in `evals.exact_match`: greedy
decoding says it if and only if each of its tokens is the most likely one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, groupby, islice
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from checkpoints.shipped import resolve
from checkpoints.world import FAMILIES, Scene, draw
from evals import baselines
from evals.exact_match import summary
from evals.pruning_sweep import stored
from models.checkpoint import Checkpoint, load
from models.flops import flops_ratio
from models.forward import forward, prefill_input
from models.llava import Llava
from models.route import Route
from models.vision.features import ImageFeatures
from pruning.dynamic.levels import Level, layers_to_run, make_route, rungs_of
from pruning.dynamic.router import Reading, Router, read_request, words
from pruning.dynamic.router_file import RouterRecord, load_router
from pruning.dynamic.token_merging import TokenPolicy
from pruning.dynamic.training.agreement import price_of

SHUFFLED = "router, another's question"
"""The router reads a question about the next picture: what its scores owe to the question."""
LAYERS = "router and layers"
"""Visual rows may pass layers by as well, those that the router foresees to cost least."""
SAME = "router, as much for each question"
"""What it is worth that questions are given what they need: the same number of tokens for all of them."""
ELASTIC = ("router", LAYERS, SHUFFLED)
ROUTED = (*ELASTIC, SAME)
POLICIES = (*ROUTED, "merging", "divprune", "cls_diversity", "uniform", "random", "pooling", "fastv", "layers")
BUDGETS = (0.62, 0.56, 0.47, 0.46)
"""Shares of the dense prefill's FLOPs: PAR's operating points on LLaVA-1.5-7B (arXiv 2412.06458, table 1)."""
SHARES = (1 / 3, 2 / 9, 1 / 9)
"""Of the visual tokens."""
TYPICAL_TEXT = 16
"""Text tokens of a typical prompt, by which a budget becomes a number of tokens."""


@dataclass(frozen=True)
class Setting:
    """A policy, how many visual tokens it keeps and layers it leaves out; or the price at which a router spends the budget on
    average."""

    policy: str
    budget: str
    keep: int
    skip: int = 0
    price: float = 0.0


@dataclass(frozen=True)
class Prompt:
    """A question, its right answer, and where the picture's tokens are among them."""

    ids: list[int]
    answer: list[int]


def settings(checkpoint: Checkpoint, router: Router | None) -> Iterator[Setting]:
    """Every policy at every budget: the most tokens, or layers, that it can afford."""
    model = checkpoint.model
    total, depth = model.visual_tokens_per_image, model.num_layers
    yield Setting("off", "off", total)
    for policy in POLICIES:
        if policy in ROUTED and router is None:
            continue
        if policy in ELASTIC:
            yield from _elastic(checkpoint, policy)
            continue
        choices = [(total, skip) for skip in range(depth - 1)] if policy == "layers" else [(k, 0) for k in range(total, 0, -1)]
        for budget in BUDGETS:
            settings = (Setting(policy, f"{budget:.0%} FLOPs", keep, skip) for keep, skip in choices)
            if best := next((one for one in settings if _typical_ratio(model, router, one) <= budget), None):
                yield best
        for share in SHARES if policy != "layers" else ():
            yield Setting(policy, f"{share:.3f} of the tokens", round(total * share))


def _elastic(checkpoint: Checkpoint, policy: str) -> Iterator[Setting]:
    """A router's budgets at the prices that spent them on the pictures which it was judged by."""
    record, total = RouterRecord.of(checkpoint.manifest), checkpoint.model.visual_tokens_per_image
    assert record is not None
    trade = record.trade["tokens and layers" if policy == LAYERS else "tokens"]
    for budget in BUDGETS:
        yield Setting(policy, f"{budget:.0%} FLOPs", total, price=price_of(trade, "flops_ratio", budget))
    for share in SHARES if policy != LAYERS else ():
        yield Setting(policy, f"{share:.3f} of the tokens", total, price=price_of(trade, "visual_ratio", share))


def _typical_ratio(model: Llava, router: Router | None, setting: Setting) -> float:
    """FLOPs ratio of a setting for a prompt of typical length."""
    total, keep = model.visual_tokens_per_image, setting.keep
    if setting.policy == "fastv":
        return baselines.fastv_ratio(model, total + TYPICAL_TEXT, keep)
    runs = tuple(layer >= setting.skip for layer in range(model.num_layers))
    route = Route(total, tuple(range(keep)), runs)
    own = router.shape.flops(total, TYPICAL_TEXT, keep) if router and setting.policy in ROUTED else 0
    return flops_ratio(model.config, route, total + TYPICAL_TEXT, own)


@dataclass
class Shown:
    """A picture, the questions about it, and questions about another one. Readings are made when first asked for."""

    checkpoint: Checkpoint
    router: Router | None
    image: ImageFeatures
    prompts: list[Prompt]
    others: list[Prompt]
    _readings: dict[tuple[int, bool], Reading] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, router: Router | None, scene: Scene, following: Scene) -> Shown:
        model = checkpoint.model
        image = model.vision(checkpoint.preprocessor.pixels(scene.image)[None].to(model.device, model.dtype))
        prompts = prompts_of(checkpoint, scene)
        return cls(checkpoint, router, image, prompts, list(islice(cycle(prompts_of(checkpoint, following)), len(prompts))))

    def reading(self, question: int, *, shuffled: bool) -> Reading:
        """What the router makes of the picture with a question, or with another picture's."""
        if (question, shuffled) not in self._readings:
            assert self.router is not None
            model, asked = self.checkpoint.model, (self.others if shuffled else self.prompts)[question]
            read = words(asked.ids, model.config.image_token_id)
            self._readings[question, shuffled] = read_request(self.router, model, [self.image], read)
        return self._readings[question, shuffled]


def route_of(setting: Setting, shown: Shown, question: int, seed: int) -> tuple[Route, Tensor, int]:
    """The route of a question, its visual tokens, and the FLOPs of whoever chose."""
    model = shown.checkpoint.model
    visual = shown.image.tokens[0]
    if setting.policy == "off":
        return Route.full(len(visual), model.num_layers), visual, 0
    if setting.policy == "layers":
        runs = layers_to_run(model.num_layers, setting.skip, shown.checkpoint.manifest.layer_change)
        return Route(len(visual), tuple(range(len(visual))), runs), visual, 0
    level = Level(setting.budget, "", setting.keep / len(visual))
    reading = shown.reading(question, shuffled=setting.policy == SHUFFLED) if setting.policy in ROUTED else None
    if setting.policy in ELASTIC and reading:
        level = _settled(setting, shown.checkpoint, reading)
    policy: TokenPolicy = "router" if reading else setting.policy  # type: ignore[assignment]
    route, used = make_route(level, [shown.image], model.num_layers, None, policy, seed, reading)
    assert used is not None
    return route, used, reading.flops(len(route.kept_tokens)) if reading else 0


def _settled(setting: Setting, checkpoint: Checkpoint, reading: Reading) -> Level:
    """What a price makes of one question; of rungs that leave out tokens alone, unless layers are asked for."""
    record = RouterRecord.of(checkpoint.manifest)
    assert record is not None
    allowed = [
        (rung, chance) for rung, chance in zip(rungs_of(record), reading.chances, strict=True)
        if setting.policy == LAYERS or rung.runs_all_layers
    ]  # fmt: skip
    level = Level(setting.budget, "", 1.0, rungs=tuple(rung for rung, _ in allowed), price=setting.price)
    return level.settled([chance for _, chance in allowed])[0]


@torch.inference_mode()
def ask(setting: Setting, shown: Shown, seed: int) -> tuple[list[bool], list[tuple[float, float]]]:
    """Whether each question about a picture is answered right; its FLOPs ratio, and the share of the visual tokens that it kept."""
    model, inputs, ratios, logits = shown.checkpoint.model, [], [], []
    for question, prompt in enumerate(shown.prompts):
        ids = torch.tensor([*prompt.ids, *prompt.answer[:-1]], device=model.device)
        if setting.policy == "fastv":
            visual = shown.image.tokens[0]
            logits.append(baselines.fastv(model, ids, visual, setting.keep, len(prompt.answer))[0])
            ratios.append((baselines.fastv_ratio(model, len(prompt.ids), setting.keep), setting.keep / len(visual)))
            continue
        route, visual, flops = route_of(setting, shown, question, seed)
        ratios.append((flops_ratio(model.config, route, len(prompt.ids), flops), len(route.kept_tokens) / route.visual_tokens))
        cache = model.new_cache(route.rows(len(ids)))
        inputs.append(prefill_input(model, ids, visual, route, cache, logits_to_keep=len(prompt.answer)))
    found = torch.cat(logits) if logits else forward(model, inputs)
    said = found.argmax(-1).cpu().split([len(prompt.answer) for prompt in shown.prompts])
    return [tokens.tolist() == prompt.answer for tokens, prompt in zip(said, shown.prompts, strict=True)], ratios


def prompts_of(checkpoint: Checkpoint, scene: Scene) -> list[Prompt]:
    preprocessor, tokenizer = checkpoint.preprocessor, checkpoint.preprocessor.tokenizer
    prompts = []
    for question in scene.questions:
        answer = [*tokenizer(f" {question.answer}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        prompts.append(Prompt(preprocessor.question(question.text), answer))
    return prompts


def run(
    asked: Sequence[Setting], checkpoint: Checkpoint, router: Router | None, pictures: int, split: str, seed: int
) -> list[dict[str, Any]]:
    """All of a policy's budgets in one pass over the pictures, each of which is drawn, encoded and read once."""
    found: list[dict[str, list[list[bool]]]] = [{family: [] for family in FAMILIES} for _ in asked]
    ratios: list[list[tuple[float, float]]] = [[] for _ in asked]
    for index in track(range(pictures), asked[0].policy, console=Console(stderr=True), transient=True):
        scene = draw(split, index)
        shown = Shown.of(checkpoint, router, scene, draw(split, index + 1))
        for number, setting in enumerate(asked):
            right, spent = ask(setting, shown, seed + index)
            found[number][scene.family].append(right)
            ratios[number] += spent
    means = [[round(mean(column), 4) for column in zip(*spent, strict=True)] for spent in ratios]
    return [
        summary(answers) | {"flops_ratio": flops, "visual_ratio": kept}
        for answers, (flops, kept) in zip(found, means, strict=True)
    ]


def key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("checkpoint", "policy", "budget", "split", "seed"))


def main(
    checkpoint: Annotated[str, typer.Argument(help="A directory, embedded or embedded-dense; with a router, if that is asked.")],
    runs: Annotated[Path, typer.Option(help="Where results are kept, one JSON line a run.")] = Path("docs/runs/routes.jsonl"),
    name: Annotated[str | None, typer.Option(help="What the checkpoint is called in the table.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="All of their questions are asked, about nine each.")] = 480,
    split: Annotated[str, typer.Option(help="test to report, validation to tune.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the router, and of the random policy.")] = 0,
    only: Annotated[str, typer.Option(help="Only settings whose policy and budget contain this text.")] = "",
) -> None:
    source = load(resolve(checkpoint))
    router = load_router(source)
    runs.parent.mkdir(parents=True, exist_ok=True)
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
        results = run(asked, source, router, pictures, split, seed)
        seconds = round((time.monotonic() - started) / len(asked), 1)
        entries = [common | asdict(setting) | result | {"seconds": seconds} for setting, result in zip(asked, results, strict=True)]
        with runs.open("a") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        for entry in entries:
            typer.echo(f"{policy}, {entry['budget']}, {entry['visual_ratio']:.1%} of the tokens: {entry['accuracy']:.2%} "
                       f"at {entry['flops_ratio']:.1%} of the FLOPs in {seconds:.0f} s")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
