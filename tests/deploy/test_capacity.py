"""docs/capacity.md follows from the run that it names."""

from __future__ import annotations

import json
import math
import re

from pruning.dynamic.levels import SIZES
from tests.deploy.live import ROOT


def test_the_table_follows_from_the_measured_run() -> None:
    results = json.loads((ROOT / "docs/runs/gpu.json").read_text())["parts"]["dense"]["results"]
    (routes,) = (result["routes"] for result in results if result["batch"] == 8)

    def taken(key: str, tokens: float) -> float:
        few, all_ = routes["128x32"][key], routes["576x32"][key]
        return float(few + (tokens - 128) / (576 - 128) * (all_ - few))

    rows = []
    for new in (4, 32):
        for level, share, _ in SIZES:
            rate = 8 / (taken("ttft_s", 576 * share) + (new - 1) * taken("tpot_s", 576 * share))
            cards = " | ".join(str(math.ceil(day * 3 / 86_400 / 0.7 / rate)) for day in (1e3, 1e5, 1e7))
            rows.append(f"| `{level}` | {new} | {rate:.1f} | {1000 / rate:.0f} | {cards} |")
    assert re.findall(r"^\| `.*$", (ROOT / "docs/capacity.md").read_text(), re.MULTILINE) == rows
