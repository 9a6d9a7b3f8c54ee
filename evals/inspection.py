"""What a checkpoint holds, for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from models.checkpoint import load
from pruning.dynamic.levels import build_menu


def run(name: str) -> None:
    checkpoint = load(name)
    model, manifest = checkpoint.model, checkpoint.manifest
    console = Console()
    console.print(
        f"[b]{checkpoint.name}[/b] ({checkpoint.fingerprint}): {model.layers} layers, "
        f"{model.visual_tokens_per_image} visual tokens an image, context {model.context_length}, "
        f"{model.weight_bytes / 1e6:.1f} MB in {str(model.dtype).removeprefix('torch.')}",
        highlight=False,
    )
    change = manifest.calibration.layer_change if manifest.calibration else None
    if change:
        table = Table("layer", "change", title="How much each layer changes the hidden state (1 - cosine)")
        for layer, value in enumerate(change):
            table.add_row(str(layer), f"{value:.4f}")
        console.print(table)
    else:
        console.print("no calibration: levels skip no layers; run `espalier calibrate`", highlight=False)
    table = Table("level", "visual tokens", "layers", "what", title="Levels")
    for level in build_menu(change, model.layers, manifest.cards).values():
        tokens = level.kept(model.visual_tokens_per_image)
        table.add_row(level.name, str(tokens), str(model.layers - level.skipped_layers), level.description)
    console.print(table)
