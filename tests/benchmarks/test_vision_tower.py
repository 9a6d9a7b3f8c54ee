"""Towers take turns, and the first turn is not counted."""

from __future__ import annotations

import torch

from benchmarks.vision_tower import measure


def test_towers_take_turns() -> None:
    seen: list[str] = []
    towers = {"torch": lambda _: seen.append("torch"), "native": lambda _: seen.append("native")}
    found = measure(towers, torch.zeros(1), 2)
    assert seen == ["torch", "native"] * 3
    assert all(len(times) == 2 and min(wall for wall, _ in times) > 0 for times in found.values())
