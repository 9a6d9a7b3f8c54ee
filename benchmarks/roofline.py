"""The roofline (Williams et al. 2009): what the machine can do at best, measured, and what a route asks of it.

No model answers faster than its roofline.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import LlavaConfig

from models.flops import prefill_flops
from models.layer_shapes import head_dim, layer_shapes
from models.linear import Linear
from models.llava import Llava
from models.quantized import Int8Linear
from models.route import Route
from models.sparse import AnyLinear
from models.vision.vit import feature_layers

STREAM_BYTES = 1 << 30
"""Far more than any cache holds."""
PRODUCTS = {"cpu": (640, 2048, 5632), "cuda": (4096, 8192, 8192)}
"""Rows, inputs and outputs of the product that is timed: a prompt through one matrix, and more to fill a GPU."""
REPEATS = 7


@dataclass(frozen=True)
class Roofline:
    """The best that was measured of a machine: bytes read from memory, and arithmetic in matrix products, also of 8-bit numbers."""

    bytes_per_s: float
    flops_per_s: float
    int8_ops_per_s: float

    def seconds(self, flops: float, nbytes: float, *, int8: bool = False) -> float:
        """The least time for so much arithmetic over so many bytes: whichever of the two takes longer."""
        return max(flops / (self.int8_ops_per_s if int8 else self.flops_per_s), nbytes / self.bytes_per_s)

    def ttft(self, model: Llava, route: Route, prompt: int, batch: int) -> float:
        """First tokens of `batch` requests, each of one image in a prompt of `prompt` tokens; weights are read once.

        The arithmetic is that of dense weights, in which every weight format but int8 meets so many rows.
        """
        config = model.config
        flops = batch * (vision_flops(config) + prefill_flops(config, route, prompt))
        seeing = [matrix for name, matrix in model.linears().items() if name.startswith(("vision.", "projector."))]
        return self.seconds(flops, decode_bytes(model, route) + sum(matrix.bytes for matrix in seeing), int8=has_int8(model))

    def tpot(self, model: Llava, route: Route, batch: int) -> float:
        """One more token of each of `batch` requests; weights are read once, and zeros that are not held are not multiplied."""
        flops = 2 * batch * sum(matrix.nonzeros for matrix in decode_matrices(model, route))
        return self.seconds(flops, decode_bytes(model, route), int8=has_int8(model))


def measure(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Time a streaming read and matrix products, torch's and ours; the best of several, since a limit is not a typical value."""
    stream = torch.ones(STREAM_BYTES // 4, device=device)  # pages never written would all be the same zero page
    reading = best_seconds(stream.sum, device)
    del stream
    rows, inputs, outputs = PRODUCTS[device.type]
    x = torch.randn(rows, inputs, device=device).to(dtype)
    weight = torch.randn(outputs, inputs, device=device).to(dtype)
    work, ours = 2 * rows * inputs * outputs, Linear(weight)
    multiplying = min(best_seconds(lambda: F.linear(x, weight), device), best_seconds(lambda: ours(x), device))
    codes, few_bits = (one.to(torch.int8) for one in (x, weight))
    whole = best_seconds(lambda: torch._int_mm(codes, few_bits.T), device)
    return Roofline(STREAM_BYTES / reading, work / multiplying, work / min(whole, multiplying))


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    work()  # the first call pays for what later ones find ready
    times = []
    for _ in range(REPEATS):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return min(times)


def wait_for(device: torch.device) -> None:
    """Until everything handed to the device is done; a CPU never lags behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def has_int8(model: Llava) -> bool:
    return any(isinstance(matrix, Int8Linear) for matrix in model.linears().values())


def decode_matrices(model: Llava, route: Route) -> list[AnyLinear]:
    """What one decode step multiplies by: the layers that run, and the head."""
    running = [block for block, runs in zip(model.decoder_layers, route.layers, strict=True) if runs]
    return [model.head, *(matrix for block in running for matrix in block.linears().values())]


def decode_bytes(model: Llava, route: Route) -> int:
    return sum(matrix.bytes for matrix in decode_matrices(model, route))


def vision_flops(config: LlavaConfig) -> int:
    """Multiply-adds times two of one image: patches, the tower's layers up to the feature layer, the projector."""
    clip, text, wanted = config.vision_config, config.text_config, feature_layers(config)
    patches, width = (clip.image_size // clip.patch_size) ** 2, clip.hidden_size
    rows = patches + 1
    embedding = patches * width * clip.num_channels * clip.patch_size**2
    shapes, dim = layer_shapes(clip)[: max(wanted)], head_dim(clip)
    heads, neurons = sum(shape.kv_heads for shape in shapes), sum(shape.ffn for shape in shapes)
    layers = rows * width * (4 * dim * heads + 2 * neurons) + 2 * rows**2 * dim * heads
    projector = patches * (len(wanted) * width * text.hidden_size + text.hidden_size**2)
    return 2 * (embedding + layers + projector)
