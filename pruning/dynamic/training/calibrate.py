"""`espalier calibrate`: how much each layer changes the hidden state, for a checkpoint that may have cards and a router already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.checkpoint import check_manifest, load
from models.errors import CheckpointError
from models.manifest import MANIFEST, Calibration, Manifest, write_manifest
from pruning import samples
from pruning.dynamic.levels import fixed_menu, layers_to_run
from pruning.dynamic.router_file import RouterRecord
from pruning.layer_importance import measure


def calibrate(
    checkpoint: Path, data: str, count: int, seed: int, device: str = "cpu", dtype: str = "auto", quiet: bool = False,
    patch_ratio: Mapping[str, float] | None = None,
) -> Calibration:  # fmt: skip
    """Measure a checkpoint's layers on `count` samples of `data` (see `pruning.samples`) and write the result into its manifest.

    `patch_ratio` is written there too: the share of the patches that the tower's later layers see at some levels. Their cards go,
    and those of levels that skip other layers now.

    Raises CheckpointError, also where a router would skip other layers than it was trained to skip, and DataError.
    """
    read = samples.read(data, count, seed, answered=False)
    loaded = load(checkpoint, device, dtype)
    given = patch_ratio or {}
    shares = {name: share for name, share in {**loaded.manifest.patch_ratio, **given}.items() if share < 1}
    manifest = loaded.manifest.model_copy(update={"patch_ratio": shares})
    check_manifest(loaded.directory, manifest, loaded.model)
    change = measure(loaded, read, count, seed, quiet)
    check_router(loaded.directory, manifest, change)
    cards = {name: card for name, card in cards_that_hold(manifest, change).items() if name not in given}
    calibration = Calibration(layer_change=change, data=data, samples=count, seed=seed)
    write_manifest(loaded.directory, manifest.model_copy(update={"calibration": calibration, "cards": cards}))
    return calibration


def check_router(directory: Path, manifest: Manifest, change: Sequence[float]) -> None:
    """Raises CheckpointError where `change` lets a router skip other layers: the agreement that it expects, and its cost weights,
    were found without those that the manifest's calibration names."""
    record, old = RouterRecord.of(manifest), manifest.calibration
    counts = {point.skipped_layers for point in record.operating_points} if record else set()
    if any(_skips_others(count, manifest.layer_change, change) for count in counts):
        before = f" (--data {old.data} --samples {old.samples} --seed {old.seed} was the one before)" if old else ""
        raise CheckpointError(
            f"{directory / MANIFEST}: by this calibration{before} the router would skip other layers than it was trained to skip; "
            "calibrate the checkpoint that it was trained for, and train one again with `espalier route`"
        )


def cards_that_hold(manifest: Manifest, change: Sequence[float]) -> dict[str, dict[str, Any]]:
    """All cards but those of levels that skip other layers by `change`; of a router's levels `check_router` makes sure."""
    skipped = {name: level.operating_points[0].skipped_layers for name, level in fixed_menu(change, len(change)).items()}
    stale = {name for name, count in skipped.items() if _skips_others(count, manifest.layer_change, change)}
    return {name: card for name, card in manifest.cards.items() if name not in stale or card.get("token_policy") == "router"}


def _skips_others(count: int, before: Sequence[float] | None, after: Sequence[float]) -> bool:
    """Whether the `count` layers to skip are others by one calibration than by another, or than by none."""
    if not count or not before:
        return count > 0
    return layers_to_run(len(after), count, before) != layers_to_run(len(after), count, after)
