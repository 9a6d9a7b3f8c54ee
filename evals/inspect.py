"""What a checkpoint holds, for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from evals.picture import check
from evals.statistics import wilson
from models.checkpoint import Checkpoint, load
from models.llava import Llava, most_visual_tokens_per_image
from models.manifest import HeldOut, Pruning, Quantization
from pruning.dynamic.levels import Level, OperatingPoint
from pruning.dynamic.planner import load_menu
from pruning.dynamic.router_file import RouterRecord

console = Console(highlight=False)
FOREIGN_ZEROS = 0.01
"""Trained weights have fewer zeros by chance."""


def run(
    directory: Path, picture: Path | None = None, device: str = "cpu", dtype: str = "auto", quantization: str | None = None
) -> None:
    """Print tables; write a picture of what was pruned to `picture`. Raises ValueError if nothing was."""
    if picture:
        check(picture)
    checkpoint = load(directory, device, dtype, quantization)
    model, manifest = checkpoint.model, checkpoint.manifest
    console.print(
        f"[b]{checkpoint.name}[/b] ({checkpoint.fingerprint}): {model.num_layers} layers, "
        f"{_visual_tokens(model)} visual tokens an image, context {model.context_length}, "
        f"{model.weight_bytes / 1e6:.1f} MB in {str(model.dtype).removeprefix('torch.')}"
    )
    if manifest.pruning:
        _show_pruning(manifest.pruning)
    elif not checkpoint.quantization and (zeros := model.sparsity())["language"] > FOREIGN_ZEROS:  # rounding makes zeros too
        shares = ", ".join(f"{name} {share:.1%}" for name, share in zeros.items())
        console.print(f"pruned elsewhere, for nothing is told of it; zeros: {shares}")
    if manifest.finetuning:
        console.print(finetuning_line(manifest.finetuning))
    if manifest.quantization:
        _show_quantization(manifest.quantization)
    _show_formats(checkpoint)
    console.print(tower_line(model))
    _show_layer_change(manifest.layer_change)
    router = RouterRecord.of(manifest)
    _show_router(router)
    menu = load_menu(checkpoint)
    _show_levels(checkpoint, menu)
    if router:
        _show_operating_points(checkpoint, router.operating_points)
    if picture:
        if not manifest.pruning:
            raise ValueError(f"{checkpoint.name} is not pruned: there is nothing to draw")
        draw(manifest.pruning, {name: level.card for name, level in menu.items() if level.card}, picture)
        console.print(f"picture: {picture}")


def _visual_tokens(model: Llava) -> str:
    fewest, most = model.visual_tokens_per_image, most_visual_tokens_per_image(model.config)
    return str(most) if fewest == most else f"{fewest} to {most}"


def _show_pruning(pruning: Pruning) -> None:
    recipe = pruning.recipe
    tower = f"tower {recipe['tower']:g}, " if recipe.get("tower") else ""
    console.print(
        f"pruned from {pruning.source}: {recipe['criterion']}, {recipe['pattern']}, sparsity {recipe['sparsity']:g}, "
        f"{tower}allocation {recipe['allocation']}, {recipe['samples']} samples, seed {recipe['seed']}"
    )
    for _, module in groupby(pruning.sparsity.items(), key=lambda entry: entry[0].partition(".")[0]):
        layers, matrices = by_layer(dict(module))
        table = Table(Column("layer", no_wrap=True), *matrices, title="Share of zeros or of weights removed")
        for layer, found in layers.items():
            table.add_row(layer, *(f"{found[matrix]:.1%}" if matrix in found else "" for matrix in matrices))
        console.print(table)
    if pruning.held_out:
        console.print(held_out_line(pruning.held_out))
    _show_damping(pruning.damping)
    for turn in pruning.projector:
        console.print(
            f"projector tuned after generation {turn['generation']}: held-out divergence {turn['before']:.2g} to "
            f"{turn['after']:.2g}, {'kept' if turn['accepted'] else 'put back'}"
        )


def _show_quantization(found: Quantization) -> None:
    console.print(
        f"rounded from {found.source} {found.fingerprint}: nf4, GPTQ on {found.samples} samples of {found.data}, seed {found.seed}"
    )
    if found.held_out:
        console.print(held_out_line(found.held_out))
    _show_damping(found.damping)


def _show_damping(raised: Mapping[str, float]) -> None:
    for name, damping in raised.items():
        console.print(f"{name}: its Hessian needed a damping of {damping:g}")


def held_out_line(found: HeldOut) -> str:
    """What pruning or rounding cost, in one line."""
    low, high = wilson(round(found.agreement * found.questions), found.questions)
    return (
        f"{found.questions} held-out questions: {found.agreement:.1%} ({low:.1%} to {high:.1%}) of the answers are the dense "
        f"model's; their perplexity is {found.perplexity:.3f}, dense {found.dense_perplexity:.3f}"
    )


def finetuning_line(told: Mapping[str, Any]) -> str:
    """How a checkpoint was trained further, in one line."""
    learned = f"what {told['teacher']} says" if told["teacher"] else "the answers of its data"
    return (
        f"trained further from {told['source']}: {told['samples']} pictures of {told['data']}, {told['epochs']} times, on "
        f"{learned}; loss {told['loss'][0]:.3g} to {told['loss'][-1]:.3g}"
    )


def by_layer(shares: Mapping[str, float]) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Sparsity as layers and their matrices: ({"language.3": {"q_proj": 0.5}}, ["q_proj"])."""
    layers: dict[str, dict[str, float]] = defaultdict(dict)
    for name, share in shares.items():
        module, index, *_, matrix = name.split(".")
        layers[f"{module}.{index}"][matrix] = share
    return dict(layers), list(dict.fromkeys(matrix for found in layers.values() for matrix in found))


def _show_formats(checkpoint: Checkpoint) -> None:
    """The weight format of each matrix (q, k and v are one, gate and up another), and the bytes of every format."""
    model = checkpoint.model
    layers = [layer.linears() for layer in model.decoder_layers]
    if any(matrix.format != "dense" for matrices in layers for matrix in matrices.values()):
        table = Table(Column("layer", no_wrap=True), *layers[0], title="Weight format, and what is not zero")
        for index, matrices in enumerate(layers):
            table.add_row(f"language.{index}", *(f"{m.format} {m.nonzeros / m.size:.1%}" for m in matrices.values()))
        console.print(table)
    console.print("weights: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in model.bytes_by_format().items()))
    plan = model.decode_plan
    console.print(f"decoding: {f'one native call a step, {plan.instructions}' if plan else 'layer by layer'}")


def tower_line(model: Llava) -> str:
    """What levels can do to the vision tower."""
    layer = model.vision.tower.merge_layer
    if layer is None:
        return "vision tower: convolutional, whole at every level"
    return f"vision tower: a transformer; levels may merge patches in its layer {layer} (`espalier calibrate --patch-ratio`)"


def _show_layer_change(change: Sequence[float] | None) -> None:
    if not change:
        console.print("no calibration: levels skip no layers; run `espalier calibrate`")
        return
    table = Table("layer", "change", title="How much each layer changes the hidden state (1 - cosine)")
    for layer, value in enumerate(change):
        table.add_row(str(layer), f"{value:.4f}")
    console.print(table)


def _show_router(router: RouterRecord | None) -> None:
    if not router:
        console.print("no router: levels choose tokens by the picture alone; run `espalier route`")
        return
    r2 = router.report["explained_variance"]
    console.print(
        f"router: {router.config.depth} layers, {router.config.width} wide, {questions_told(router.report)}; "
        f"predicts attention with R² {r2['token_scores']:.2f} and the cost of freezing layers with {r2['layer_scores']:.2f} "
        "(held-out pictures)", highlight=False, soft_wrap=True,
    )  # fmt: skip


def questions_told(report: Mapping[str, Any]) -> str:
    """How many a router was trained on; older files count the held-out ones with them."""
    if "learned_questions" in report:
        return f"trained on {report['learned_questions']} questions"
    return f"trained and measured on {report['questions']} questions"


def _show_levels(checkpoint: Checkpoint, menu: dict[str, Level]) -> None:
    total, layers = checkpoint.model.visual_tokens_per_image, checkpoint.model.num_layers
    table = Table("level", "visual tokens", "layers", "accuracy", "what", title="Levels")
    for level in menu.values():
        point = level.operating_points[-1]
        by_question = [f"{round(total * level.visual_ratio)} on average", ""]
        shown = by_question if level.routed else [str(point.kept(total)), str(layers - point.skipped_layers)]
        card = level.card or {}
        table.add_row(level.name, *shown, f"{card['accuracy']:.1%}" if "accuracy" in card else "", level.description)
    console.print(table)


def _show_operating_points(checkpoint: Checkpoint, points: Sequence[OperatingPoint]) -> None:
    """What a router chooses from: tokens, layers, in how many of those visual tokens are frozen, and held-out answers that stay."""
    total, layers = checkpoint.model.visual_tokens_per_image, checkpoint.model.num_layers
    table = Table("visual tokens", "layers", "frozen", "FLOPs", "agreement", title="The router's operating points")
    for point in points:
        runs = str(layers - point.skipped_layers)
        table.add_row(str(point.kept(total)), runs, str(point.frozen_layers), f"{point.cost:.0%}", f"{point.agreement:.1%}")
    console.print(table)


def draw(pruning: Pruning, cards: dict[str, dict[str, float]], path: Path) -> None:
    """Sparsity by layer and matrix, the search's course and each level's accuracy, as far as they are there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = {name: card["accuracy"] for name, card in cards.items() if "accuracy" in card}
    count = 1 + bool(pruning.search) + bool(measured)
    figure, axes = pyplot.subplots(1, count, figsize=(6 * count, 4), squeeze=False)
    layers, matrices = by_layer(pruning.sparsity)
    values = [[found.get(matrix, float("nan")) for matrix in matrices] for found in layers.values()]
    first, *rest = axes[0]
    shown = first.imshow(values, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    first.set_xticks(range(len(matrices)), matrices, rotation=45, ha="right")
    first.set_yticks(range(len(layers)), list(layers))
    first.set_title("sparsity")
    figure.colorbar(shown, ax=first)
    if pruning.search:
        chart = rest.pop(0)
        chart.plot([entry["divergence"] for entry in pruning.search], label="divergence")
        for turn in pruning.projector:
            chart.axvline(turn["generation"], color="gray", linestyle=":" if turn["accepted"] else "--", linewidth=0.8)
        chart.set(title="search: best policy (lines: projector tuned)", xlabel="generation", ylabel="mean KL from dense")
    if measured:
        rest[0].bar(list(measured), list(measured.values()))
        rest[0].set(title="accuracy by level", ylim=(0, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
