"""Make docs/smol_results.md from the stored documents of `espalier eval smol`: `python -m evals.smol_report`, or `make tables`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from evals.runs import stored

Document = dict[str, Any]
HEAD = """# What smol knows

Made by `make tables` from `docs/runs/smol.jsonl`, the last lines of `espalier eval smol --dtype float32 --task …` with what a row
names. One training run. Right is what [evaluation.md](evaluation.md) says; in brackets 95 % intervals. Splits: `test` is drawn by a
hand that is in no training picture (OpenMoji), its signs and charts set in typefaces that are in none; `known` by the hands of
training.

| task | split | wordings | level | visual tokens | prefill FLOPs | questions | right |
|---|---|---|---|---|---|---|---|
"""
BY_FAMILY = "\n## By family\n\n| task | split | wordings | level | family | questions | right |\n|---|---|---|---|---|---|---|\n"
FEW = 12
"""Families, at most, that are shown by themselves."""
SERVED = """
## Over HTTP

`espalier bench http` against `espalier serve smol --dtype float32` on two cores of an Intel Xeon without AMX, answers of at most 8 tokens,
new pictures each time; medians of three runs in turn (2026-11-26). Levels merge tokens.

| | `off` | `strong` or `balanced` | ratio |
|---|---|---|---|
| one client, median time to first token, `strong` | 0.51 s | 0.28 s | 0.55 |
| one client, median whole answer, `strong` | | | 0.58 |
| eight clients, requests a second, `balanced` | 1.87 | 2.90 | 1.55 |

The vision tower takes 0.12 s of each, whatever the level: it is what stands between these figures and a half.
"""
PERPLEXITY = """
## Text alone

Perplexity of English text without pictures, against SmolLM2-135M-Instruct itself:

| text | tokens | smol | SmolLM2 | ratio |
|---|---|---|---|---|
"""


def main(
    runs: Annotated[Path, typer.Option(help="Stored documents.")] = Path("docs/runs/smol.jsonl"),
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
    out.write_text("".join([*parts, SERVED]))


def _row(one: Document) -> str:
    spent = (f"{one['visual_tokens']:.0f}", f"{one['flops_ratio']:.0%}", one["n"])
    return _cells(*_about(one), *spent, _share(one))


def _about(one: Document) -> tuple[str, str, str, str]:
    return one["task"], one.get("split", "test"), one.get("paraphrase", ""), one["level"]


def _families(one: Document) -> Sequence[str]:
    return [_cells(*_about(one), name, cell["n"], _share(cell)) for name, cell in one["families"].items()]


def _texts(one: Document) -> Sequence[str]:
    sources = {**one["sources"], "all": one}
    return [
        _cells(name, cell["tokens"], f"{cell['perplexity']:.2f}", f"{cell['against']:.2f}", f"{cell['ratio']:.3f}")
        for name, cell in sources.items()
    ]


def _share(cell: Document) -> str:
    low, high = cell["interval"]
    return f"{cell['accuracy']:.1%} ({100 * low:.1f}–{100 * high:.1f})"


def _cells(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    typer.run(main)
