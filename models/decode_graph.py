"""Decoding on a GPU: a step of up to 32 requests through all layers and the head, as one CUDA graph, without Python for a layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from models.cuda_graph import Captured, can_capture, capture
from models.decode import Rows
from models.ops import apply_rope, rms_norm
from models.upload import upload

if TYPE_CHECKING:  # it holds the plan
    from models.llava import Llava

log = logging.getLogger("espalier.kernels")

BUCKETS = (1, 2, 4, 8, 16, 32)
"""Requests of which there is a graph; others run in the next larger one, with rows that are no request's."""
NOBODY = (0, 0, 0, 0)


@dataclass(frozen=True)
class GraphPlan:
    """The rows of a step, where a graph finds them, and the graphs that were made, one for each bucket.

    hidden [32, width]; positions [32]; table [32, 4] as `append_and_attend` reads it. A graph is made when its bucket first runs.
    Where that fails the same step runs without, as it does on a CPU, in Triton's interpreter.
    """

    model: Llava
    hidden: Tensor
    positions: Tensor
    table: Tensor
    graphs: dict[int, Captured[Tensor] | None] = field(default_factory=dict)
    instructions: ClassVar = "CUDA graphs"
    max_rows: ClassVar = 0
    """Of answers and parts of prompts together: these run apart."""

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Llava) -> GraphPlan | None:
        """None where Triton is missing, or its kernels fail with this model: the caller then runs layer by layer."""
        if find_spec("triton") is None:
            log.warning("Triton is not installed: decoding runs request by request")
            return None
        most, device = BUCKETS[-1], model.device
        plan = cls(
            model,
            hidden=torch.zeros(most, len(model.norm), dtype=model.dtype, device=device),
            positions=torch.zeros(most, dtype=torch.int64, device=device),
            table=torch.zeros(most, len(NOBODY), dtype=torch.int64, device=device),
        )
        try:
            plan._run(1)
        except Exception:
            log.exception("decoding runs request by request: its kernels failed")
            return None
        return plan

    def takes(self, batch: Sequence[Rows]) -> bool:
        """Whether these are new tokens, one each, of requests that run every layer: no layer's cache is empty or smaller."""
        return len(batch) <= BUCKETS[-1] and all(
            len(one) == one.logits_to_keep == 1 and one.text_spans is None and len(set(one.cache.capacity)) == 1
            and one.hidden.dtype == self.hidden.dtype
            for one in batch
        )  # fmt: skip

    def step(self, batch: Sequence[Rows]) -> Tensor:
        """float32 logits [requests, vocab]. Keys and values are appended to each request's cache.

        Raises RuntimeError for a cache without room.
        """
        count, bucket = len(batch), next(size for size in BUCKETS if size >= len(batch))
        if bucket not in self.graphs:
            self.graphs[bucket] = self._capture(bucket)
        places = [one.cache.place(0) for one in batch]  # the slabs of the other layers follow and are filled alike
        for one in batch:
            one.cache.append_rows(1)
        self.table[:bucket] = upload([*places, *[NOBODY] * (bucket - count)], self.table.device)
        torch.cat([one.hidden for one in batch], out=self.hidden[:count])
        torch.cat([one.positions for one in batch], out=self.positions[:count])
        if (captured := self.graphs[bucket]) is None:
            return self._run(bucket)[:count]
        return captured.replay()[:count].clone()  # the next replay writes there again

    def _run(self, requests: int) -> Tensor:
        from models.kernels.attention_triton import append_and_attend

        model, x, table = self.model, self.hidden[:requests], self.table[:requests]
        cos, sin = model.rope(self.positions[:requests])
        heads_before = 0
        for layer in model.decoder_layers:
            qkv = layer.qkv(rms_norm(x, layer.input_norm, model.eps)).view(requests, -1, model.head_dim)
            rotated, value = apply_rope(qkv[:, : -layer.kv_heads], cos, sin), qkv[:, -layer.kv_heads :]
            query, key = rotated[:, : layer.heads], rotated[:, layer.heads :]
            mixed = append_and_attend(query, key, value, table, heads_before, model.head_dim**-0.5)
            x = layer.behind_attention(x, mixed.flatten(1), model.eps)
            heads_before += layer.kv_heads
        return model.logits(x)

    def _capture(self, bucket: int) -> Captured[Tensor] | None:
        """A graph and the logits [bucket, vocab] that it writes."""
        matrices = [matrix for layer in self.model.decoder_layers for matrix in layer.linears().values()]
        if self.hidden.device.type != "cuda" or not can_capture([*matrices, self.model.head]):
            return None
        self.table.zero_()  # nobody's cache is written
        return capture(lambda: self._run(bucket), f"steps of {bucket} requests", self.hidden.device, self.graphs.values())
