"""Make a page of results of pruning and its picture from the stored runs of a checkpoint; `make tables` makes the shipped ones'."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from evals.pruning_sweep import ALLOCATIONS, CRITERIA, grid, key
from evals.runs import stored
from evals.statistics import half_width

Entry = dict[str, Any]

HEAD = """# What pruning costs {checkpoint}

Made by `make tables` from `{runs}`; one line there is one run of `espalier prune` and one test.
Accuracy is exact match on every question of {pictures} held-out test pictures ({questions} questions). The language model's
matrices are pruned, the vision tower is dense. Each cell is the mean over its runs, each of another seed (which draws the
calibration samples and every choice of the search), ± the half-width of the 95 % interval of that mean (Student's t); one
run has none. In brackets, its share of the dense checkpoint's accuracy, **{dense:.2%}** ({low:.2%} to {high:.2%}, bootstrap
over pictures), and its number of runs.
"""


def main(
    runs: Annotated[Path, typer.Option(help="Stored runs.")] = Path("docs/runs/pruning.jsonl"),
    out: Annotated[Path, typer.Option(help="The page to write; its picture goes beside it.")] = Path("docs/pruning_results.md"),
) -> None:
    entries = stored(runs)
    dense = next((entry for entry in entries if entry["pattern"] == "dense"), None)
    if dense is None:
        raise typer.BadParameter(f"{runs} has no run of the dense checkpoint; run `python -m evals.pruning_sweep` first")
    order = [key({**setting, "seed": 0})[:-1] for setting in grid(list(dense["families"]))]
    pruned = [entry for entry in entries if entry["pattern"] != "dense"]
    pruned.sort(key=lambda entry: order.index(key(entry)[:-1]))
    low, high = dense["interval"]
    checkpoint = dense.get("checkpoint", "the embedded checkpoint")
    head = HEAD.format(
        checkpoint=checkpoint, runs=runs, pictures=dense["pictures"], questions=dense["questions"],
        dense=dense["accuracy"], low=low, high=high,
    )  # fmt: skip
    parts = [head, *_overall(pruned, dense), *_by_family(pruned, dense), *_unseen(pruned)]
    if picture := _picture(pruned, dense, checkpoint, out.with_suffix(".png")):
        parts.insert(1, f"![accuracy against sparsity]({picture.name})\n")
    out.write_text("\n".join(parts) + "\n")


def _groups(entries: Sequence[Entry], *names: str) -> dict[tuple[Any, ...], list[Entry]]:
    found = defaultdict(list)
    for entry in entries:
        found[tuple(entry[name] for name in names)].append(entry)
    return found


def _cell(values: Sequence[float], dense: float | None = None) -> str:
    if not values:
        return ""
    text = f"{mean(values):.1%}"
    if len(values) > 1:
        text += f" ± {100 * half_width(values):.1f}"
    return f"{text} ({mean(values) / dense:.1%}, n = {len(values)})" if dense else text


def _overall(entries: Sequence[Entry], dense: Entry) -> list[str]:
    groups = _groups([e for e in entries if e["calibrated_on"] == "all"], "pattern", "allocation", "criterion")
    criteria = [criterion for criterion in CRITERIA if any(asked == criterion for _, _, asked in groups)]
    lines = ["## Accuracy\n"]
    for pattern in dict.fromkeys(pattern for pattern, _, _ in groups):
        lines += [f"### {pattern}\n", f"| allocation | {' | '.join(criteria)} |", "|---|" + "---|" * len(criteria)]
        for allocation in ALLOCATIONS:
            cells = [
                _cell([e["accuracy"] for e in groups.get((pattern, allocation, criterion), [])], dense["accuracy"])
                for criterion in criteria
            ]
            if any(cells):
                lines.append(f"| {allocation} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _by_family(entries: Sequence[Entry], dense: Entry) -> list[str]:
    groups = _groups([e for e in entries if e["calibrated_on"] == "all"], "pattern", "criterion", "allocation")
    lines = ["## By family\n"]
    names = list(dense["families"])
    lines += [f"| pattern | criterion | allocation | {' | '.join(names)} |", "|---|---|---" + "|---" * len(names) + "|"]
    shown = " | ".join(f"{share:.1%}" for share in dense["families"].values())
    lines.append(f"| dense | | | {shown} |")
    for (pattern, criterion, allocation), group in groups.items():
        cells = " | ".join(_cell([e["families"][family] for e in group]) for family in names)
        lines.append(f"| {pattern} | {criterion} | {allocation} | {cells} |")
    return [*lines, ""]


def _unseen(entries: Sequence[Entry]) -> list[str]:
    """Calibrated and searched on one family: accuracy on that one and on the others."""
    alone = [e for e in entries if e["calibrated_on"] != "all"]
    if not alone:
        return []
    lines = ["## Calibrated and searched on one family alone\n", "| pattern | allocation | seen | unseen |", "|---|---|---|---|"]
    groups = _groups(alone, "pattern", "allocation")
    for (pattern, allocation), group in groups.items():
        seen = [e["families"][e["calibrated_on"]] for e in group]
        unseen = [_on_unseen(e) for e in group]
        families = len({e["calibrated_on"] for e in group})
        lines.append(f"| {pattern} | {allocation} | {_cell(seen)} | {_cell(unseen)} ({len(group)} runs, {families} families) |")
    lines.append("\nDifferences in accuracy on unseen families, in points, paired by family and seed:\n")
    for (pattern, first), (same, second) in combinations(groups, 2):
        if pattern == same:
            lines.append(f"- {pattern}: {second} less {first}: {_difference(groups[pattern, first], groups[pattern, second])}")
    return [*lines, ""]


def _on_unseen(entry: Entry) -> float:
    return mean(share for family, share in entry["families"].items() if family != entry["calibrated_on"])


def _difference(first: Sequence[Entry], second: Sequence[Entry]) -> str:
    """Of accuracy on unseen families, over the pairs that both have."""
    found = [{(e["calibrated_on"], e["seed"]): _on_unseen(e) for e in group} for group in (first, second)]
    pairs = [100 * (found[1][key] - found[0][key]) for key in found[0].keys() & found[1].keys()]
    return f"{mean(pairs):+.2f} ± {half_width(pairs):.2f} ({len(pairs)} pairs)" if len(pairs) > 1 else "too few pairs"


def _picture(entries: Sequence[Entry], dense: Entry, checkpoint: str, path: Path) -> Path | None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = _groups([e for e in entries if e["calibrated_on"] == "all" and e["pattern"].endswith("unstructured")],
                     "criterion", "allocation")  # fmt: skip
    if not groups:
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for (criterion, allocation), group in groups.items():
        points = {s: mean(e["accuracy"] for e in found) for (s,), found in _groups(group, "pattern").items()}
        at = sorted((float(name.split("%")[0]), accuracy) for name, accuracy in points.items())
        axes.plot(*zip(*at, strict=True), marker="o", markersize=3, label=f"{criterion}, {allocation}")
    axes.axhline(dense["accuracy"], color="black", linewidth=0.8, linestyle=":", label="dense")
    axes.set(xlabel="zeros in the language model's matrices, %", ylabel="accuracy", title=f"{checkpoint}, held-out test")
    axes.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    typer.run(main)
