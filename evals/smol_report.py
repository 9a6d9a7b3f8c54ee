"""Make docs/smol_results.md from the stored documents of `espalier eval smol`: `python -m evals.smol_report`, or `make tables`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from evals.runs import stored

Document = dict[str, Any]
HEAD = """# What smol knows

Made by `make tables` from `docs/runs/smol.jsonl`, the last lines of `espalier eval smol --task …` with what a row names, in
bfloat16 as served (text alone: `--dtype float32`); `make smol-results` runs what is missing. One training run. Of fewer than 4,000
questions about scenes, the first ones are asked: of 800, dense weights answer 80.1 % at `off`, of 400, 81.0 %. Right is what
[evaluation.md](evaluation.md) says; in brackets 95 % intervals. Splits: `test` is drawn by a hand that is in no training picture
(OpenMoji), its signs and charts set in typefaces that are in none; `known` by the hands of training.

| weights | task | split | wordings | level | visual tokens | prefill FLOPs | questions | right |
|---|---|---|---|---|---|---|---|---|
"""
BY_FAMILY = """
## By family

| weights | task | split | wordings | level | family | questions | right |
|---|---|---|---|---|---|---|---|
"""
FEW = 12
"""Families, at most, that are shown by themselves."""
SERVED = """
## Over HTTP

From `docs/runs/smol_http.jsonl`: `espalier bench http` against `espalier serve smol`, and the same with `--quantization int8`, on
two quiet cores of an AMD Zen 5, which the client uses too. Answers of at most 8 tokens, new pictures each time, levels
by merging; medians of runs in turn. The vision tower costs every request the same, whatever its level. Of 16 clients some are
refused, and do not ask again.

| weights | clients | level | runs | requests/s | first token s | whole answer s |
|---|---|---|---|---|---|---|
"""
PERPLEXITY = """
## Text alone

Perplexity of English text without pictures, against SmolLM2-135M-Instruct itself:

| text | tokens | smol | SmolLM2 | ratio |
|---|---|---|---|---|
"""


def main(
    runs: Annotated[Path, typer.Option(help="Stored documents.")] = Path("docs/runs/smol.jsonl"),
    served: Annotated[Path, typer.Option(help="Stored documents of `espalier bench http`.")] = Path("docs/runs/smol_http.jsonl"),
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/smol_results.md"),
) -> None:
    documents = stored(runs)
    asked = [one for one in documents if one["task"] != "perplexity"]
    if not asked:
        raise typer.BadParameter(f"{runs} has no documents; add last lines of `espalier eval smol`")
    parts = [HEAD, *(_row(one) for one in asked), BY_FAMILY]
    parts += [row for one in asked if len(one["families"]) <= FEW for row in _families(one)]
    for one in documents:
        if one["task"] == "perplexity":
            parts += [PERPLEXITY, *_texts(one)]
    out.write_text("".join([*parts, SERVED, *_served(stored(served))]))


def _row(one: Document) -> str:
    spent = (f"{one['visual_tokens']:.0f}", f"{one['flops_ratio']:.0%}", one["n"])
    return _cells(*_about(one), *spent, _share(one))


def _about(one: Document) -> tuple[str, ...]:
    return _weights(one), one["task"], one.get("split", "test"), one.get("paraphrase", ""), one["level"]


def _weights(one: Document) -> str:
    variant = one.get("variant", "smol")
    zeros = "dense"
    if variant.startswith("half"):
        zeros = f"50 % zeros by {'ALPS' if variant.startswith('half-alps') else 'OBS'}"
    tuned = f", finetuned on {one['finetuned_on']} pictures" if "finetuned_on" in one else ""
    router = f", {variant.replace('-', ' ')}" if variant.startswith("router") else ""
    return one.get("quantization") or zeros + tuned + router


def _families(one: Document) -> Sequence[str]:
    return [_cells(*_about(one), name, cell["n"], _share(cell)) for name, cell in one["families"].items()]


def _texts(one: Document) -> Sequence[str]:
    sources = {**one["sources"], "all": one}
    return [
        _cells(name, cell["tokens"], f"{cell['perplexity']:.2f}", f"{cell['against']:.2f}", f"{cell['ratio']:.3f}")
        for name, cell in sources.items()
    ]


def _served(documents: Sequence[Document]) -> Sequence[str]:
    """One row for each kind of weights, number of clients and level; in brackets over the first row's of as many clients."""
    runs: dict[tuple[str, int, str], list[Document]] = {}
    for one in documents:
        for level, found in one["levels"].items():
            runs.setdefault((one.get("quantization") or "bfloat16", one["concurrency"], level), []).append(found)
    rows: list[str] = []
    first: dict[int, list[float]] = {}
    for (weights, clients, level), found in runs.items():
        times = (median(one[key]["p50"] for one in found) for key in ("ttft_s", "e2e_s"))
        values = [median(one["requests_per_s"] for one in found), *times]
        base = first.setdefault(clients, values)
        shown = [f"{value:.2f} ({value / other:.2f}×)" for value, other in zip(values, base, strict=True)]
        rows.append(_cells(weights, clients, f"`{level}`", len(found), *shown))
    return rows


def _share(cell: Document) -> str:
    low, high = cell["interval"]
    return f"{cell['accuracy']:.1%} ({100 * low:.1f}–{100 * high:.1f})"


def _cells(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    typer.run(main)
