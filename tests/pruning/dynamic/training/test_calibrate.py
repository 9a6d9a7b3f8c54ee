"""A checkpoint calibrated anew: which cards stay, and what becomes of a router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.errors import CheckpointError
from models.manifest import Calibration, Manifest, read_manifest, write_manifest
from pruning.dynamic.training import calibrate as module
from pruning.dynamic.training.calibrate import calibrate, cards_that_hold, check_router
from tests.pruning.dynamic.tiny_router import plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.server.tiny import LAYERS, write

LOW_2 = [0.5, 0.2, 0.1, *[0.3] * 12, 1.0]
"""Of 16 layers the third changes least."""
LOW_2_TOO = [0.6, 0.3, 0.05, *[0.4] * 12, 1.0]
LOW_3 = [0.5, 0.2, 0.3, 0.1, *[0.3] * 11, 1.0]
CARDS: dict[str, Any] = {name: {"accuracy": 0.5, "token_policy": "merging"} for name in ("off", "light", "balanced", "strong")}


def manifest_of(change: list[float] | None, **about: Any) -> Manifest:
    calibration = Calibration(layer_change=change, data="world", samples=64, seed=0) if change else None
    return Manifest(calibration=calibration, **about)


@pytest.mark.parametrize(("before", "lost"), [(LOW_2, set()), (LOW_2_TOO, set()), (LOW_3, {"strong"}), (None, {"strong"})])
def test_cards_of_levels_that_skip_other_layers_go(before: list[float] | None, lost: set[str]) -> None:
    assert CARDS.keys() - cards_that_hold(manifest_of(before, cards=CARDS), LOW_2).keys() == lost
    routed = {"strong": {"accuracy": 0.5, "token_policy": "router"}}
    assert cards_that_hold(manifest_of(before, cards=routed), LOW_2) == routed


def test_where_no_level_skips_a_layer_all_cards_stay() -> None:
    assert cards_that_hold(manifest_of([0.5, 0.1, 0.2, 1.0], cards=CARDS), [0.5, 0.2, 0.1, 1.0]) == CARDS


@pytest.mark.parametrize(("before", "skipped", "refused"), [
    (LOW_2_TOO, 1, False), (LOW_3, 1, True), (None, 1, True), (LOW_3, 0, False), (LOW_2_TOO, 2, False),
])  # fmt: skip
def test_a_router_skips_what_it_was_trained_to_skip(
    routed: Path, before: list[float] | None, skipped: int, refused: bool
) -> None:
    router = read_manifest(routed).router
    assert router is not None
    points = [{**point, "skipped_layers": skipped} for point in router["operating_points"][:1]] + router["operating_points"][-1:]
    manifest = manifest_of(before, router={**router, "operating_points": points})
    check_router(routed, manifest_of(before), LOW_2)
    if not refused:
        check_router(routed, manifest, LOW_2)
        return
    with pytest.raises(CheckpointError, match=r"would skip other layers than it was trained to skip.*espalier route"):
        check_router(routed, manifest, LOW_2)


def test_a_calibration_that_is_refused_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path / "tiny")
    cards = {**CARDS, "auto": {"accuracy": 0.5}}
    write_manifest(directory, read_manifest(directory).model_copy(update={"cards": cards}))
    found = calibrate(directory, "world", 1, 5, quiet=True, patch_ratio={"strong": 0.5, "light": 0.75})
    calibrate(directory, "world", 1, 5, quiet=True, patch_ratio={"light": 1.0})
    manifest = read_manifest(directory)
    assert manifest.calibration == found and len(found.layer_change) == LAYERS
    assert manifest.patch_ratio == {"strong": 0.5} and set(manifest.cards) == {"off", "balanced", "auto"}

    def refuse(*_: Any) -> None:
        raise CheckpointError

    monkeypatch.setattr(module, "check_router", refuse)
    with pytest.raises(CheckpointError):
        calibrate(directory, "world", 2, 6, quiet=True, patch_ratio={"balanced": 0.5})
    assert read_manifest(directory) == manifest
