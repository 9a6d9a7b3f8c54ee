"""How fast is the model alone? Random weights at real geometry: the roofline first, then us and transformers in turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlavaConfig

from benchmarks import roofline
from benchmarks.memory import peak_bytes
from benchmarks.report import finish
from benchmarks.runners import (
    TEXT_TOKENS,
    EspalierRunner,
    Prompts,
    Runner,
    Timing,
    TransformersRunner,
    cut_out,
    prune_randomly,
    quantize,
    random_prompts,
    share_weights,
    transformers_only_bytes,
)
from models.flops import flops_ratio
from models.llava import Llava
from models.quantized import bitsandbytes
from models.random_llava import geometry_config, random_model
from models.route import Route
from pruning.dynamic.router import Router, RouterConfig, default_width

DTYPES = ("float32", "bfloat16", "float16")
STRUCTURED = "structured"
PATTERNS = ("unstructured", "2:4", STRUCTURED)


def run(
    geometry: str, routes: Sequence[str] | None, batches: Sequence[int], new_tokens: int, repeats: int, device: str, dtype: str,
    quiet: bool, sparsity: float | None = None, pattern: str = "unstructured", routed: bool = False,
    quantization: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure and print: one JSON document a batch size, each on a line of its own. They are also returned.

    TTFT and TPOT are those of the whole batch, answered at once. transformers answers one request after another and does not
    prune, so that its one figure, times the batch, is the baseline of every route. Memory is that of one request on the full
    route. With a `sparsity` every route also runs, as `... sparse`, on pruned weights (with the pattern `structured` in the tower
    too), and with a `quantization`, as `... nf4`, on quantized ones. With `routed`, an untrained router of real size chooses each
    route's tokens. `new_tokens` is at least 2. Raises ValueError for what cannot be run.
    """
    console = Console(stderr=True, quiet=quiet)
    config, place, precision = geometry_config(geometry), pick_device(device), pick_dtype(dtype)
    chosen = {name: parse_route(name, config) for name in routes or default_routes(config)}
    check_sparsity(sparsity, pattern)
    if quantization:
        bitsandbytes()  # or it says what to install
    limits = roofline.measure(place, precision)
    memory, compute, int8 = (limit / 1e9 for limit in (limits.bytes_per_s, limits.flops_per_s, limits.int8_ops_per_s))
    console.print(f"{place}, {dtype}: memory {memory:.1f} GB/s, products {compute:,.0f} GFLOP/s, of 8 bits {int8:,.0f} GOP/s")
    reference = random_model(config, dtype=precision, device=str(place))
    model = share_weights(reference)
    full = EspalierRunner(model, Route.full(config.image_seq_length, model.num_layers))
    # Before transformers has run for the first time and left its own buffers, and before there are pruned weights.
    peak = peak_bytes(lambda: full.run(random_prompts(model, 1), new_tokens), place)
    router = untrained_router(model) if routed else None
    runners = {name: EspalierRunner(model, route, router) for name, route in chosen.items()}
    sparse: dict[str, Any] = {}
    if sparsity is not None:
        pruned = cut_out(model, sparsity) if pattern == STRUCTURED else prune_randomly(model, sparsity, pattern)
        runners |= {f"{name} sparse": EspalierRunner(pruned, route, router) for name, route in chosen.items()}
        sparse = {"sparsity": sparsity, "pattern": pattern, **describe(pruned, model, full.route)}
    quantized: dict[str, Any] = {}
    if quantization:
        few_bits = quantize(model, quantization)
        runners |= {f"{name} {quantization}": EspalierRunner(few_bits, route, router) for name, route in chosen.items()}
        quantized = {"format": quantization, **describe(few_bits, model, full.route)}
    common = {
        "geometry": geometry,
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else str(place),
        "dtype": dtype,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "sparse": sparse or None,
        "quantized": quantized or None,
        "peak_bytes": peak,  # vision layers that only transformers runs, counted next, lie in it too
        "transformers_only_bytes": transformers_only_bytes(reference, model),
        "weight_bytes": model.weight_bytes,
        "peak_over_weights": peak / model.weight_bytes,
    }
    documents = []
    for batch in batches:
        prompts = random_prompts(model, batch)
        length = prompts.ids.shape[1]
        bounds = {
            name: {"ttft_s": limits.ttft(one.model, one.route, length, batch), "tpot_s": limits.tpot(one.model, one.route, batch)}
            for name, one in runners.items()
        }
        for name, bound in bounds.items():
            console.print(f"roofline of {name}: first token {bound['ttft_s']:.3g} s, then {bound['tpot_s']:.3g} s each")
        ours, baseline = measure(runners, TransformersRunner(reference), prompts, new_tokens, repeats, console)
        document = common | {
            "batch": batch,
            "prompt_tokens": length,
            "roofline": {**asdict(limits), "routes": bounds},
            "routes": {
                name: compare(ours[name], baseline, bounds[name], batch) | stages(one, ours, name, length)
                for name, one in runners.items()
            },
            "over_dense": {name: speedups(ours[f"{name} sparse"], ours[name]) for name in chosen if sparse},
            "quantized_over_dense": {name: speedups(ours[f"{name} {quantization}"], ours[name]) for name in chosen if quantized},
            "transformers": summarise(baseline, 1),
        }
        show(document, console)
        documents.append(finish(document))
    return documents


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
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_sparsity(sparsity: float | None, pattern: str) -> None:
    if pattern not in PATTERNS:
        raise ValueError(f"pattern {pattern!r} is not one of {', '.join(PATTERNS)}")
    if sparsity is not None and not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is not in [0, 1)")
    if pattern == "2:4" and sparsity != 0.5:
        raise ValueError(f"pattern 2:4 is a sparsity of 0.5, not {sparsity}")


def default_routes(config: LlavaConfig) -> list[str]:
    layers, visual = config.text_config.num_hidden_layers, config.image_seq_length
    return [f"{visual}x{layers}", f"{min(128, visual // 4)}x{layers}"]


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
    runners: Mapping[str, Runner], baseline: Runner, prompts: Prompts, new_tokens: int, repeats: int, console: Console
) -> tuple[dict[str, list[Timing]], list[Timing]]:
    """Every runner and the baseline in turn, `repeats` times, so that a machine that slows down slows all."""
    for runner in (*runners.values(), baseline):
        runner.run(prompts, 2)
    ours: dict[str, list[Timing]] = {name: [] for name in runners}
    theirs = []
    for _ in track(range(repeats), "measuring", console=console):
        for name, runner in runners.items():
            ours[name].append(runner.run(prompts, new_tokens))
        theirs.append(baseline.run(prompts, new_tokens))
    return ours, theirs


def summarise(timings: Sequence[Timing], batch: int) -> dict[str, float]:
    """Medians, and throughput: tokens a second while decoding, and whole answers a second, from picture to last token."""
    tpot = median(timing.tpot for timing in timings)
    return {
        "ttft_s": median(timing.ttft for timing in timings),
        "tpot_s": tpot,
        "tokens_per_s": batch / tpot,
        "requests_per_s": batch / median(timing.e2e for timing in timings),
    }


def compare(ours: Sequence[Timing], baseline: Sequence[Timing], bound: dict[str, float], batch: int) -> dict[str, float]:
    """A route's medians, its speedups over the baseline and how many times its roofline it takes."""
    own = summarise(ours, batch)
    return own | speedups(ours, baseline, batch) | {
        "ttft_over_roofline": own["ttft_s"] / bound["ttft_s"],
        "tpot_over_roofline": own["tpot_s"] / bound["tpot_s"],
    }  # fmt: skip


def speedups(ours: Sequence[Timing], others: Sequence[Timing], times: int = 1) -> dict[str, float]:
    """How many times as fast as `others`, run so many `times` one after another: medians over pairs of runs."""
    pairs = list(zip(ours, others, strict=True))
    return {
        "ttft_speedup": median(times * b.ttft / a.ttft for a, b in pairs),
        "tpot_speedup": median(times * b.tpot / a.tpot for a, b in pairs),
        "requests_speedup": median(times * b.e2e / a.e2e for a, b in pairs),
    }


def stages(runner: EspalierRunner, ours: Mapping[str, Sequence[Timing]], name: str, prompt: int) -> dict[str, float]:
    """Where a route's first token goes, and its arithmetic: share of the dense prefill's FLOPs, the router's own beside it, and how
    many times that share its prompt takes of the full route's time in the same run (0 where that was not run). Medians."""
    config, route, router = runner.model.config, runner.route, runner.router
    full = f"{config.image_seq_length}x{len(route.layers)}" + name.removeprefix(name.split()[0])
    share = flops_ratio(config, route, prompt)
    pairs = zip(ours[name], ours.get(full, []), strict=False)
    ratios = [timing.prefill / dense.prefill for timing, dense in pairs]
    own = router.config.flops(route.visual_tokens, TEXT_TOKENS, len(route.kept_tokens)) if router and route.dropped else 0
    return {
        "encode_s": median(timing.encode for timing in ours[name]),
        "route_s": median(timing.route for timing in ours[name]),
        "prefill_s": median(timing.prefill for timing in ours[name]),
        "kv_bytes": ours[name][0].kv_bytes,
        "flops_ratio": share,
        "router_flops_ratio": flops_ratio(config, route, prompt, own) - share,
        "prefill_over_flops": median(ratios) / share if ratios else 0.0,
    }


def untrained_router(model: Llava) -> Router:
    """One of the width that `espalier route` gives it: what it costs does not depend on what it has learned."""
    torch.manual_seed(0)
    width = model.config.text_config.hidden_size
    return Router(RouterConfig(width, model.num_layers, default_width(width))).serving(model.dtype).to(model.device)


def describe(pruned: Llava, model: Llava, full: Route) -> dict[str, Any]:
    """What pruning or quantizing left of the language layers: zeros, bytes by format, and resident bytes over the dense ones."""
    head = model.head.bytes
    return {
        "zeros": pruned.sparsity()["language"],
        "weight_bytes": pruned.bytes_by_format(),
        "matrix_bytes_ratio": (roofline.decode_bytes(pruned, full) - head) / (roofline.decode_bytes(model, full) - head),
    }


def show(document: dict[str, Any], console: Console) -> None:
    table = Table("route", "TTFT s", "TPOT s", "tokens/s", "requests/s", title=f"{document['geometry']}, batch {document['batch']}")
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
        zeros, gone = f"{sparse['zeros']:.1%} zeros ({sparse['pattern']})", f"{sparse['sparsity']:.1%} of heads and neurons gone"
        show_lighter(gone if sparse["pattern"] == STRUCTURED else zeros, sparse, document["over_dense"], console)
    if quantized := document["quantized"]:
        show_lighter(quantized["format"], quantized, document["quantized_over_dense"], console)
    console.print(
        f"peak {document['peak_bytes'] / 1e9:.2f} GB for one request, {document['peak_over_weights']:.2f}× "
        f"the weights' {document['weight_bytes'] / 1e9:.2f} GB"
    )


def show_lighter(name: str, about: Mapping[str, Any], over_dense: Mapping[str, Mapping[str, float]], console: Console) -> None:
    """Weights that take fewer bytes: how many, and what that does to speed."""
    speed = ", ".join(f"{route} {row['tpot_speedup']:.2f}× and {row['requests_speedup']:.2f}×" for route, row in over_dense.items())
    console.print(
        f"{name}: language matrices take {about['matrix_bytes_ratio']:.3f} of the dense bytes; against our dense weights, tokens/s "
        f"of decoding and whole answers/s: {speed}"
    )
