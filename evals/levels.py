"""What each level does to questions that come first and second in a chat, and what `auto` makes of them.

`python -m evals.levels embedded --runs docs/runs/levels.jsonl`: one JSON line a run. Agreement is with the un-pruned model's own
greedy answer in the same chat, token by token; accuracy with the right one. The second question follows another one about the same
picture, with the model's own answer to it. Both are read off one forward pass over the answer, as in `evals.exact_match`.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track

from checkpoints.shipped import resolve
from checkpoints.world import Scene, draw
from evals.exact_match import RESAMPLES
from evals.pruning_sweep import stored
from evals.routing_sweep import prompts_of
from evals.scenes import MAX_TOKENS
from models.checkpoint import Checkpoint, load
from models.flops import flops_ratio
from models.route import Route
from pruning.dynamic.levels import AUTO, PRUNED, Level, make_route, menu_of, worthwhile_level
from pruning.dynamic.router import Reading, Router, read_request, words
from pruning.dynamic.router_file import load_router
from pruning.dynamic.training.teacher import Asked, answers, gives

SHARES = (2 / 3, 7 / 12, 1 / 2, 1 / 3)
"""Of the visual tokens, for all questions alike: fixed budgets, against which `auto` has to be worth it. All layers run, for where
visual rows pass three eighths of them by fewer than 98 of 100 answers stay, however many tokens do (`router.measured`)."""


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


Talks = tuple[list[Asked], list[list[int]], list[list[int]]]
"""Questions about one picture, the model's own answers, and the right ones."""


def talks(checkpoint: Checkpoint, scene: Scene, visual: torch.Tensor) -> dict[str, Talks]:
    """The picture's questions, each alone and each after the one before it."""
    preprocessor, tokenizer = checkpoint.preprocessor, checkpoint.preprocessor.tokenizer
    prompts = prompts_of(checkpoint, scene)
    alone, right = [Asked(prompt.ids, visual) for prompt in prompts], [prompt.answer for prompt in prompts]
    own = answers(checkpoint.model, alone, checkpoint.eos, MAX_TOKENS)
    spoken = [(q.text, tokenizer.decode(a, skip_special_tokens=True).strip()) for q, a in zip(scene.questions, own, strict=True)]
    before = [spoken[-1], *spoken[:-1]]
    second = [
        Asked(preprocessor.question(q.text, [turn]), visual) for q, turn in zip(scene.questions, before, strict=True)
    ]
    return {"alone": (alone, own, right), "second": (second, answers(checkpoint.model, second, checkpoint.eos, MAX_TOKENS), right)}


def read_all(checkpoint: Checkpoint, router: Router, asked: Sequence[Asked]) -> list[Reading]:
    model = checkpoint.model
    return [
        read_request(router, model, [one.image], words(one.prompt, model.config.image_token_id)) for one in asked
    ]


def ask(
    checkpoint: Checkpoint, level: Level, talk: Talks, readings: Sequence[Reading]
) -> tuple[list[bool], list[bool], list[float]]:
    """Of each question: whether its answer agrees, whether it is right, and its FLOPs ratio."""
    asked, own, right = talk
    model, change = checkpoint.model, checkpoint.manifest.layer_change
    routes: list[Route] = []
    routed: list[Asked] = []
    ratios = []
    for one, reading in zip(asked, readings, strict=True):
        settled = level.settled(reading.chances)[0] if level.rungs else level
        route, visual = make_route(settled, [one.image], model.num_layers, change, "router", 0, reading if level.routed else None)
        assert visual is not None
        flops = reading.flops(len(route.kept_tokens)) if level.routed else 0
        ratios.append(flops_ratio(model.config, route, len(one.prompt), flops))
        routes.append(route)
        routed.append(Asked(one.prompt, visual))
    agreed = gives(model, routed, own, routes)
    correct = list(agreed)
    wrong = [i for i in range(len(own)) if own[i] != right[i]]  # of the others, to agree is to be right
    if wrong:
        again = gives(model, [routed[i] for i in wrong], [right[i] for i in wrong], [routes[i] for i in wrong])
        for i, found in zip(wrong, again, strict=True):
            correct[i] = found
    return agreed, correct, ratios


def run(checkpoint: Checkpoint, router: Router, pictures: int, split: str) -> dict[str, Any]:
    menu = menu_of(checkpoint.manifest, checkpoint.model.num_layers)
    alike = [Level(f"{share:.3f} of the tokens", "", share) for share in SHARES]
    columns: dict[tuple[str, str], Column] = defaultdict(Column)
    taken: dict[str, int] = defaultdict(int)
    for index in track(range(pictures), "asking", console=Console(stderr=True)):
        scene = draw(split, index)
        pixels = checkpoint.preprocessor.pixels(scene.image)[None].to(checkpoint.model.device, checkpoint.model.dtype)
        visual = checkpoint.model.vision(pixels).tokens[0]
        for place, talk in talks(checkpoint, scene, visual).items():
            readings = read_all(checkpoint, router, talk[0])
            outcome = {level.name: ask(checkpoint, level, talk, readings) for level in menu.values() if level.name != AUTO}
            chosen = [worthwhile_level(menu, reading.chances, later=place == "second")[0].name for reading in readings]
            for name, found in outcome.items():
                columns[place, name].add(*found)
            agreed, right, ratios = [], [], []
            for i, name in enumerate(chosen):
                agreed.append(outcome[name][0][i])
                right.append(outcome[name][1][i])
                # A request that is sent to `off` was read all the same.
                ratios.append(outcome[name][2][i] + (_reading(checkpoint, talk[0][i], readings[i]) if name == "off" else 0))
                taken[f"{place}/{name}"] += 1
            columns[place, AUTO].add(agreed, right, ratios)
            for level in alike if place == "alone" else ():
                columns[place, level.name].add(*ask(checkpoint, level, talk, readings))
    levels: dict[str, dict[str, Any]] = defaultdict(dict)
    for (place, name), column in columns.items():
        levels[place][name] = summary(column)
    return {
        "levels": dict(levels), "taken": dict(taken),
        "against_alike": against(columns, [level.name for level in alike]), "against_levels": against(columns, PRUNED),
        "against_alone": against_alone(columns), "prices": [menu[AUTO].price, menu[AUTO].later_price],
    }  # fmt: skip


def _reading(checkpoint: Checkpoint, asked: Asked, reading: Reading) -> float:
    """FLOPs of reading alone over those of the dense prefill."""
    config, full = checkpoint.model.config, Route.full(len(asked.visual), checkpoint.model.num_layers)
    return flops_ratio(config, full, len(asked.prompt), reading.flops(len(asked.visual))) - 1


def _drawn(pictures: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, pictures, (RESAMPLES, pictures))


def summary(column: Column) -> dict[str, Any]:
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


def against(columns: dict[tuple[str, str], Column], names: Sequence[str]) -> dict[str, Any]:
    """The cheapest of the budgets with these `names`, or `off`, that agrees as often as `auto`; and the share of its FLOPs that
    `auto` saves, paired by picture."""
    auto = columns["alone", AUTO]
    agreement, _, ratio = auto.shares()
    others = {name: columns["alone", name] for name in ("off", *names)}
    equal = {name: column for name, column in others.items() if column.shares()[0] >= agreement}
    name = min(equal, key=lambda name: equal[name].shares()[2])
    drawn = _drawn(len(auto.counts))
    saved = 1 - auto.shares(drawn)[:, 2:] / equal[name].shares(drawn)[:, 2:]
    found = equal[name].shares()
    return {
        "level": name, "agreement": round(float(found[0]), 4), "flops_ratio": round(float(found[2]), 4),
        **_named(("saved",), 1 - ratio / found[2:], saved),
    }  # fmt: skip


def against_alone(columns: dict[tuple[str, str], Column]) -> dict[str, Any]:
    """What it costs `auto` that a question comes second in a chat: how far its agreement and accuracy lie from those that `off` has
    there, less the same of questions asked alone. With 95 % bootstrap intervals over pictures."""

    def gained(drawn: np.ndarray | None = None) -> np.ndarray:
        second, alone = (columns[place, AUTO].shares(drawn) - columns[place, "off"].shares(drawn) for place in ("second", "alone"))
        return second - alone

    return _named(("agreement", "accuracy"), gained(), gained(_drawn(len(columns["second", AUTO].counts))))


def main(
    checkpoint: Annotated[str, typer.Argument(help="A directory with a router, embedded or embedded-dense.")],
    runs: Annotated[Path, typer.Option(help="Where results are kept, one JSON line a run.")] = Path("docs/runs/levels.jsonl"),
    name: Annotated[str | None, typer.Option(help="What the checkpoint is called in the table.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="All of their questions are asked, about nine each.")] = 480,
    split: Annotated[str, typer.Option(help="test to report, validation to tune.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the router.")] = 0,
) -> None:
    source = load(resolve(checkpoint))
    router = load_router(source)
    if router is None:
        raise typer.BadParameter(f"{checkpoint} has no router; train one with `espalier route`")
    entry: dict[str, Any] = {"checkpoint": name or checkpoint, "split": split, "seed": seed, "pictures": pictures}
    if any(entry.items() <= done.items() for done in stored(runs)):
        typer.echo("stored already")
        return
    started = time.monotonic()
    entry |= run(source, router, pictures, split)
    entry["seconds"] = round(time.monotonic() - started, 1)
    with runs.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    typer.echo(json.dumps(entry, indent=1))


if __name__ == "__main__":
    typer.run(main)
