"""How fast is the model alone? Random weights at real geometry: the ceiling first, then us and transformers in turn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlavaConfig, LlavaForConditionalGeneration

from benchmarks import roofline
from benchmarks.memory import peak_bytes
from benchmarks.report import finish
from benchmarks.runners import (
    TEXT_TOKENS,
    Questions,
    Run,
    answer,
    draw_questions,
    generate,
    prune,
    share_weights,
    transformers_only_bytes,
)
from models.checkpoint import DTYPES
from models.flops import flops_ratio
from models.llava import Llava
from models.random_llava import geometry_config, random_model
from models.route import Route
from pruning.dynamic.router import Router, RouterConfig, default_width


def run(
    geometry: str, routes: Sequence[str] | None, batch: int, new_tokens: int, repeats: int, device: str, dtype: str,
    quiet: bool, sparsity: float | None = None, pattern: str = "unstructured", routed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure and print; the last line is one JSON document, which is also returned.

    TTFT and time per token are those of the whole batch, answered at once. transformers answers one request after
    another and does not prune, so that its one figure, times the batch, is the baseline of every route. Memory is that
    of one request on the full route. With a `sparsity` every route runs twice, on the dense weights and, as `... sparse`, on
    pruned ones. With `routed`, an untrained router of real size chooses each route's tokens. `new_tokens` is at
    least 2. Raises ValueError for what cannot be run.
    """
    console = Console(stderr=True, quiet=quiet)
    config, place, precision = geometry_config(geometry), pick_device(device), pick_dtype(dtype)
    chosen = {name: parse_route(name, config) for name in routes or default_routes(config)}
    check_sparsity(sparsity, pattern)
    limits = roofline.measure(place, precision)
    memory, matrices = limits.bytes_per_s / 1e9, limits.flops_per_s / 1e9
    console.print(f"{place}, {dtype}: memory {memory:.1f} GB/s, matrices {matrices:,.0f} GFLOP/s")
    reference = random_model(config, dtype=precision, device=str(place))
    model = share_weights(reference)
    questions = draw_questions(model, batch)
    prompt = questions.ids.shape[1]
    full = Route.full(config.image_seq_length, model.num_layers)
    # Before transformers has run for the first time and left its own buffers, and before there are pruned weights.
    peak = peak_bytes(lambda: answer(model, questions.first(), full, new_tokens), place)
    sides = {name: (model, route) for name, route in chosen.items()}
    sparse: dict[str, Any] = {}
    if sparsity is not None:
        pruned = prune(model, sparsity, pattern)
        sides |= {f"{name} sparse": (pruned, route) for name, route in chosen.items()}
        sparse = {"sparsity": sparsity, "pattern": pattern, **describe(pruned, model, full)}
    bounds = {
        name: {"ttft_s": limits.ttft(side, route, prompt, batch), "tpot_s": limits.tpot(side, route, batch)}
        for name, (side, route) in sides.items()
    }
    for name, bound in bounds.items():
        console.print(f"ceiling of {name}: first token {bound['ttft_s']:.3g} s, then {bound['tpot_s']:.3g} s each")
    router = untrained_router(model) if routed else None
    ours, theirs = measure(sides, reference, questions, new_tokens, repeats, console, router)
    document = {
        "geometry": geometry,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        "dtype": dtype,
        "batch": batch,
        "prompt_tokens": prompt,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "ceiling": {"bytes_per_s": limits.bytes_per_s, "flops_per_s": limits.flops_per_s, "routes": bounds},
        "routes": {
            name: compare(runs, theirs, bounds[name], batch) | parts(config, sides[name][1], router, ours, name, prompt)
            for name, runs in ours.items()
        },
        "sparse": sparse | {"over_dense": {name: gain(ours[f"{name} sparse"], ours[name]) for name in chosen}} if sparse else None,
        "transformers": summarise(theirs, 1),
        "peak_bytes": peak,  # vision layers that only transformers runs, counted next, lie in it too
        "transformers_only_bytes": transformers_only_bytes(reference, model),
        "weight_bytes": model.weight_bytes,
        "peak_over_weights": peak / model.weight_bytes,
    }
    show(document, console)
    return finish(document)


def pick_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in roofline.PRODUCTS:
        raise ValueError(f"device {name!r} is not cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there; torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def pick_dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}: random weights were never saved in any")
    return DTYPES[name]


def check_sparsity(sparsity: float | None, pattern: str) -> None:
    if pattern not in ("unstructured", "2:4"):
        raise ValueError(f"pattern {pattern!r} is not unstructured or 2:4")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1)")
    if pattern == "2:4" and sparsity != 0.5:
        raise ValueError(f"pattern 2:4 is a sparsity of 0.5, not {sparsity}")


def default_routes(config: LlavaConfig) -> list[str]:
    layers = config.text_config.num_hidden_layers
    return [f"{config.image_seq_length}x{layers}", f"128x{layers}"]


def parse_route(name: str, config: LlavaConfig) -> Route:
    """`128x20` to the route of 128 visual tokens, spread evenly, and 20 layers; the last but one are left out.

    Raises ValueError, saying what is allowed.
    """
    visual, layers = config.image_seq_length, config.text_config.num_hidden_layers
    match = re.fullmatch("([0-9]+)x([0-9]+)", name)
    tokens, depth = map(int, match.groups()) if match else (0, 0)
    if not (1 <= tokens <= visual and 1 <= depth <= layers):
        raise ValueError(
            f"route {name!r} is not visual tokens x layers, such as {visual}x{layers}: "
            f"1 to {visual} tokens and 1 to {layers} layers"
        )
    skipped = range(depth - 1, layers - 1)
    kept = tuple(i * visual // tokens for i in range(tokens))
    return Route(visual, kept, tuple(layer not in skipped for layer in range(layers)))


def measure(
    sides: dict[str, tuple[Llava, Route]], reference: LlavaForConditionalGeneration, questions: Questions,
    new_tokens: int, repeats: int, console: Console, router: Router | None = None,
) -> tuple[dict[str, list[Run]], list[Run]]:  # fmt: skip
    """Every model on its route and transformers in turn, `repeats` times, so that a machine that slows down slows all."""
    for model, route in sides.values():
        answer(model, questions, route, 2, router)
    generate(reference, questions.first(), 2)
    ours: dict[str, list[Run]] = {name: [] for name in sides}
    theirs = []
    for _ in track(range(repeats), "measuring", console=console):
        for name, (model, route) in sides.items():
            ours[name].append(answer(model, questions, route, new_tokens, router))
        theirs.append(generate(reference, questions.first(), new_tokens))
    return ours, theirs


def summarise(runs: Sequence[Run], batch: int) -> dict[str, float]:
    """Medians over the runs: tokens a second while decoding, and whole answers a second, from picture to last token."""
    tpot = median(run.tpot for run in runs)
    return {
        "ttft_s": median(run.ttft for run in runs),
        "tpot_s": tpot,
        "tokens_per_s": batch / tpot,
        "requests_per_s": batch / median(run.total for run in runs),
    }


def compare(ours: Sequence[Run], theirs: Sequence[Run], bound: dict[str, float], batch: int) -> dict[str, float]:
    """A route's medians, its speedups (medians over pairs of runs) and how many times its ceiling it takes."""
    pairs = list(zip(ours, theirs, strict=True))
    own = summarise(ours, batch)
    return own | {
        "ttft_speedup": median(batch * b.ttft / a.ttft for a, b in pairs),
        "tpot_speedup": median(batch * b.tpot / a.tpot for a, b in pairs),
        "requests_speedup": median(batch * b.total / a.total for a, b in pairs),
        "ttft_over_ceiling": own["ttft_s"] / bound["ttft_s"],
        "tpot_over_ceiling": own["tpot_s"] / bound["tpot_s"],
    }


def parts(
    config: LlavaConfig, route: Route, router: Router | None, ours: dict[str, list[Run]], name: str, prompt: int
) -> dict[str, float]:
    """Where a route's first token goes, and its arithmetic: share of the dense prefill's FLOPs, the router's own beside it, and how
    many times that share its prompt takes of the full route's time in the same run (0 where that was not run). Medians."""
    full = f"{config.image_seq_length}x{len(route.layers)}" + name.removeprefix(name.split()[0])
    share = flops_ratio(config, route, prompt)
    pairs = zip(ours[name], ours.get(full, []), strict=False)
    times = [run.prefill / dense.prefill for run, dense in pairs]
    own = router.config.flops(route.visual_tokens, TEXT_TOKENS, len(route.kept_tokens)) if router and route.dropped else 0
    return {
        "encode_s": median(run.encode for run in ours[name]),
        "route_s": median(run.route for run in ours[name]),
        "prefill_s": median(run.prefill for run in ours[name]),
        "kv_bytes": ours[name][0].kv_bytes,
        "flops_ratio": share,
        "router_flops_ratio": flops_ratio(config, route, prompt, own) - share,
        "prefill_over_flops": median(times) / share if times else 0.0,
    }


def untrained_router(model: Llava) -> Router:
    """One of the width that `espalier route` gives it: what it costs does not depend on what it has learned."""
    torch.manual_seed(0)
    width = model.config.text_config.hidden_size
    return Router(RouterConfig(width, model.num_layers, default_width(width))).serving(model.dtype).to(model.device)


def describe(pruned: Llava, model: Llava, full: Route) -> dict[str, Any]:
    """What pruning left of the language layers: zeros, bytes by form, and resident bytes over the dense ones."""
    head = model.head.bytes
    return {
        "zeros": pruned.sparsity()["language"],
        "weight_bytes": pruned.bytes_by_format(),
        "matrix_bytes_ratio": (roofline.decode_bytes(pruned, full) - head) / (roofline.decode_bytes(model, full) - head),
    }


def gain(sparse: Sequence[Run], dense: Sequence[Run]) -> dict[str, float]:
    """How many times as fast the sparse weights are as our own dense ones, medians over pairs of runs."""
    pairs = list(zip(sparse, dense, strict=True))
    return {
        "ttft_speedup": median(b.ttft / a.ttft for a, b in pairs),
        "tpot_speedup": median(b.tpot / a.tpot for a, b in pairs),
        "requests_speedup": median(b.total / a.total for a, b in pairs),
    }


def show(document: dict[str, Any], console: Console) -> None:
    table = Table("route", "first token s", "each next s", "then tokens/s", "requests/s", title=document["geometry"])
    for name, row in (document["routes"] | {"transformers": document["transformers"]}).items():
        ratios = {key: f" ({value:.2f}×)" for key, value in row.items() if key.endswith("speedup")}
        table.add_row(
            name,
            f"{row['ttft_s']:.4g}{ratios.get('ttft_speedup', '')}",
            f"{row['tpot_s']:.4g}{ratios.get('tpot_speedup', '')}",
            f"{row['tokens_per_s']:.4g}",
            f"{row['requests_per_s']:.4g}{ratios.get('requests_speedup', '')}",
        )
    console.print(table)
    for name, row in document["routes"].items():
        console.print(
            f"{name}: picture {row['encode_s']:.3g} s, router {row['route_s']:.3g} s, prompt {row['prefill_s']:.3g} s for "
            f"{row['flops_ratio']:.1%} of the dense FLOPs; {row['kv_bytes'] / 1e6:.2f} MB of keys and values"
        )
    if sparse := document["sparse"]:
        speed = ", ".join(
            f"{name} {row['tpot_speedup']:.2f}× and {row['requests_speedup']:.2f}×" for name, row in sparse["over_dense"].items()
        )
        console.print(
            f"{sparse['zeros']:.1%} zeros ({sparse['pattern']}): language matrices take {sparse['matrix_bytes_ratio']:.3f} of the "
            f"dense bytes; against our dense weights, tokens/s of decoding and whole answers/s: {speed}"
        )
    console.print(
        f"peak {document['peak_bytes'] / 1e9:.2f} GB for one request, {document['peak_over_weights']:.2f}× "
        f"the weights' {document['weight_bytes'] / 1e9:.2f} GB"
    )
