"""The roofline: what a route asks of the machine."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.roofline import Roofline, decode_bytes, vision_flops
from benchmarks.runners import cut_out, share_weights
from models import kernels
from models.flops import prefill_flops
from models.random_llava import random_model, tiny_config
from models.route import Route


def test_a_roofline_is_the_slower_of_arithmetic_and_memory():
    machine = Roofline(bytes_per_s=10.0, flops_per_s=100.0, int8_ops_per_s=400.0)
    assert machine.seconds(200, 10) == 2
    assert machine.seconds(200, 50) == 5
    assert machine.seconds(200, 1, int8=True) == 0.5


def test_rooflines_follow_the_route():
    config = tiny_config()
    model = share_weights(random_model(config))
    full, few = Route.full(16, 3), Route(16, (1, 2), (True, False, True))
    block = sum(matrix.bytes for matrix in model.decoder_layers[0].linears().values())
    assert decode_bytes(model, full) - decode_bytes(model, few) == block
    arithmetic = Roofline(bytes_per_s=float("inf"), flops_per_s=1.0, int8_ops_per_s=2.0)
    difference = arithmetic.ttft(model, full, 56, 2) - arithmetic.ttft(model, few, 56, 2)
    assert difference == 2 * (prefill_flops(config, full, 56) - prefill_flops(config, few, 56))
    assert arithmetic.tpot(model, full, 3) == 3 * 2 * decode_bytes(model, full) / 4


@pytest.mark.parametrize("share", [0, 0.5])
def test_vision_flops_are_those_of_torch(share, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: None)  # torch counts its own products alone
    monkeypatch.setattr(kernels, "many_rows", lambda: "bfloat16")  # and does not count its fused attention on a CPU
    config = tiny_config()
    config.vision_config.image_size = 160  # so many rows that the tower's few spare ones do not count
    model = cut_out(share_weights(random_model(config)), share)
    with FlopCounterMode(display=False) as counter:
        model.vision(torch.zeros(1, 3, 160, 160))
    assert vision_flops(model.config) == pytest.approx(counter.get_total_flops(), rel=0.05)
