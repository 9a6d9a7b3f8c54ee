"""CUDA graphs: kernels that are started together, without Python between them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from models.quantized import Int8Linear
from models.sparse import AnyLinear

log = logging.getLogger("espalier.kernels")
Output = TypeVar("Output")


@dataclass(frozen=True)
class Captured(Generic[Output]):
    """`replay` computes once more what was captured, from the tensors that it read then, and writes it into `output`."""

    graph: torch.cuda.CUDAGraph
    output: Output

    def replay(self) -> Output:
        self.graph.replay()
        return self.output


def can_capture(matrices: Iterable[AnyLinear]) -> bool:
    """Not LLM.int8(), which asks the device where outliers are."""
    return not any(isinstance(matrix, Int8Linear) for matrix in matrices)


def capture(
    run: Callable[[], Output], what: str, device: torch.device, beside: Iterable[Captured[Output] | None]
) -> Captured[Output] | None:
    """A graph of `run`; None, and a line in the log, where that fails. It shares its memory with the graphs `beside` it, so that
    a replay of one may overwrite the output of another."""
    pool = next((one.graph.pool() for one in beside if one), None)
    try:
        with torch.cuda.device(device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                run()  # compiles, and lets libraries take their memory: a graph can hold neither
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = run()
    except Exception:
        log.exception("%s run without a CUDA graph", what)
        return None
    return Captured(graph, output)
