"""Pages of mapped weights are given back, and nothing else is."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.mapped import give_back


def resident_file_bytes() -> int:
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells what is mapped")
def test_pages_of_a_mapped_file_go_and_come_back(tmp_path: Path) -> None:
    wanted = torch.randn(2048, 2048)
    save_file({"a": wanted, "b": wanted + 1}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        a, b = file.get_tensor("a"), file.get_tensor("b")
    assert torch.equal(a, wanted) and torch.equal(b, wanted + 1)  # both are read
    before = resident_file_bytes()
    give_back([a])
    assert before - resident_file_bytes() > 0.9 * a.nbytes
    assert torch.equal(a, wanted) and torch.equal(b, wanted + 1)


def test_weights_in_memory_are_left_alone() -> None:
    weight = torch.randn(2048, 2048)
    copy = weight.clone()
    give_back([weight, torch.empty(0), torch.randn(3)])
    assert torch.equal(weight, copy)
