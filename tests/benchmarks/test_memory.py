"""Peak memory."""

from __future__ import annotations

import torch

from benchmarks.memory import peak_bytes

CPU = torch.device("cpu")


def test_the_peak_of_a_later_phase_is_its_own():
    def hold(count: int) -> None:
        torch.ones(count, dtype=torch.uint8)

    large, small = peak_bytes(lambda: hold(1 << 28), CPU), peak_bytes(lambda: hold(1 << 20), CPU)
    assert large >= 1 << 28
    assert small <= large  # equal where the kernel does not reset the mark
