"""Make docs/routing_results.md and its picture from the stored runs: `python -m evals.routing_report`, or `make tables`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from evals.routing_sweep import POLICIES
from evals.runs import stored
from evals.statistics import half_width

Entry = dict[str, Any]

HEAD = """# What routing costs the embedded checkpoints

Made by `make tables` from `docs/runs/routes.jsonl`. Accuracy is exact match on every question of {pictures} held-out test
pictures ({questions} questions), teacher-forced. In brackets: its share of the accuracy at `off`, then the FLOPs ratio, the
router's own FLOPs included. A policy whose router was trained with several seeds has their mean ± the half-width of its 95 %
interval (Student's t). Budgets of a router are averages: each question takes what it needs, but for the row
"as much for each question". One run's 95 % bootstrap interval over pictures is about ± 0.5 points. The budgets in FLOPs are
PAR's (arXiv 2412.06458, table 1), which kept 95.8, 93.8, 92.8 and 91.1 % of LLaVA-1.5-7B's accuracy there.
"""
LEVELS = """### Levels

From `docs/runs/levels.jsonl`: agreement with the same checkpoint's answer at `off`, accuracy, and FLOPs ratio, of opening
questions and of the same questions as follow-ups of another one about the same picture. Means over {seeds} router(s); agreement
with a run's 95 % bootstrap interval over pictures.

| level | opening: agreement | accuracy | FLOPs | follow-up: agreement | accuracy | FLOPs |
|---|---|---|---|---|---|---|"""
AUTO = """What `auto` saves against the cheapest budget that agrees as often: of budgets that are the same for all questions, and of
levels, which are budgets on average. Last: follow-up less opening questions, each against `off`, in points. In brackets, 95 %
intervals.

| router | `auto` agrees | FLOPs | same for all | FLOPs | saved | level | FLOPs | saved | follow-up: agreement | accuracy |
|---|---|---|---|---|---|---|---|---|---|---|"""


def main(
    runs: Annotated[Path, typer.Option(help="Stored runs of policies.")] = Path("docs/runs/routes.jsonl"),
    out: Annotated[Path, typer.Option(help="The page to write; its picture goes beside it.")] = Path("docs/routing_results.md"),
    levels: Annotated[Path, typer.Option(help="Stored runs of levels.")] = Path("docs/runs/levels.jsonl"),
) -> None:
    entries = [entry for entry in stored(runs) if entry["split"] == "test"]
    if not entries:
        raise typer.BadParameter(f"{runs} has no test runs; run `python -m evals.routing_sweep policies embedded` first")
    parts = [HEAD.format(pictures=entries[0]["pictures"], questions=entries[0]["questions"])]
    for checkpoint in dict.fromkeys(entry["checkpoint"] for entry in entries):
        own = [entry for entry in entries if entry["checkpoint"] == checkpoint]
        picture = _picture(own, checkpoint, out.with_name(f"{out.stem}_{checkpoint}.png"))
        parts += [f"## {checkpoint}\n", f"![accuracy against arithmetic]({picture.name})\n", *_table(own), ""]
        parts += _levels([one for one in stored(levels) if one["checkpoint"] == checkpoint and one["split"] == "test"])
    out.write_text("\n".join(parts))


def _levels(runs: Sequence[Entry]) -> list[str]:
    if not runs:
        return []
    lines = [LEVELS.format(seeds=len(runs))]
    menu = [name for name in runs[0]["levels"]["follow_up"] if name != "off"]
    for name in ["off", *menu]:
        cells = [cell for place in ("first", "follow_up") for cell in _level_cells([run["levels"][place][name] for run in runs])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", AUTO]
    for run in sorted(runs, key=lambda run: run["seed"]):
        auto = run["levels"]["first"]["auto"]
        cells = [str(run["seed"]), f"{auto['agreement']:.2%}", f"{auto['flops_ratio']:.1%}"]
        cells += [*_saved(run["against_fixed"]), *_saved(run["against_levels"])]
        cells += [_points(run, "agreement"), _points(run, "accuracy")]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _saved(other: Entry) -> list[str]:
    """The cells of a budget: its name, its FLOPs ratio, and what `auto` saves of it."""
    low, high = (f"{bound:.1%}" for bound in other["saved_interval"])
    return [other["level"], f"{other['flops_ratio']:.1%}", f"{other['saved']:.1%} ({low} to {high})"]


def _points(run: Entry, what: str) -> str:
    """How much better or worse follow-up questions are, in points."""
    found = run["follow_up_against_first"]
    low, high = (f"{100 * bound:+.2f}" for bound in found[f"{what}_interval"])
    return f"{100 * found[what]:+.2f} ({low} to {high})"


def _level_cells(found: Sequence[Entry]) -> list[str]:
    low, high = (mean(one["agreement_interval"][side] for one in found) for side in (0, 1))
    agreement = f"{mean(one['agreement'] for one in found):.1%} ({100 * low:.1f}–{100 * high:.1f})"
    return [agreement, *(f"{mean(one[name] for one in found):.1%}" for name in ("accuracy", "flops_ratio"))]


def _table(entries: Sequence[Entry]) -> list[str]:
    off = next(entry["accuracy"] for entry in entries if entry["policy"] == "off")
    cells = _cells(entries)
    budgets = list(dict.fromkeys(budget for _, budget in cells))
    lines = [f"`off`: {off:.2%}\n", f"| policy | {' | '.join(budgets)} |", "|---|" + "---|" * len(budgets)]
    for policy in sorted({policy for policy, _ in cells}, key=POLICIES.index):
        row = [_cell(cells.get((policy, budget), []), off) for budget in budgets]
        lines.append(f"| {policy} | {' | '.join(row)} |")
    return lines


def _cells(entries: Sequence[Entry]) -> dict[tuple[str, str], list[Entry]]:
    """The runs, one a seed, of each policy at each budget; `off` aside."""
    cells: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry["policy"] != "off":
            cells[entry["policy"], entry["budget"]].append(entry)
    return cells


def _cell(entries: Sequence[Entry], off: float) -> str:
    if not entries:
        return ""
    values = [entry["accuracy"] for entry in entries]
    spread = f" ± {100 * half_width(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1%}{spread} ({mean(values) / off:.1%}; {mean(entry['flops_ratio'] for entry in entries):.0%})"


def _picture(entries: Sequence[Entry], checkpoint: str, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5))
    colors = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    off = next(entry["accuracy"] for entry in entries if entry["policy"] == "off")
    for axes in panels:
        axes.axhline(off, color="black", linewidth=0.8, linestyle=":", label="off")
        for policy, curve in _curves(entries).items():
            color, style = colors[POLICIES.index(policy)], "-" if policy.startswith("router") else "--"
            axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, linestyle=style, color=color, label=policy)
        axes.set(xlabel="prefill FLOPs over dense", ylabel="accuracy")
    panels[0].set_title(f"{checkpoint}, held-out test")
    panels[1].set(title="the same, near the top", ylim=(off - 0.1, off + 0.005))
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _curves(entries: Sequence[Entry]) -> dict[str, list[tuple[float, float]]]:
    """Each policy's points, from little arithmetic to much: FLOPs ratio and accuracy, means over seeds."""
    curves: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (policy, _), runs in _cells(entries).items():
        curves[policy].append((mean(one["flops_ratio"] for one in runs), mean(one["accuracy"] for one in runs)))
    return {policy: sorted(points) for policy, points in curves.items()}


if __name__ == "__main__":
    typer.run(main)
