"""The packed forward: all requests' rows side by side, each running only what its route keeps.

Hidden states are [rows, width] for prompts and single new tokens alike. A dropped visual token has no row. A skipped layer runs on
the other requests' rows only. Nothing is padded, and no row is computed that nobody reads: in its last layer a request goes on with
the rows whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import attend, attend_packed, packs
from models.decode_graph import GraphPlan
from models.kv_cache import RequestCache
from models.llava import DecoderLayer, Llava
from models.ops import apply_rope, rms_norm
from models.route import Route
from models.upload import upload

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SequenceInput:
    """One request's new rows: the kept tokens of its prompt, or one token when decoding.

    hidden [n, width]; positions [n], int64, those in the whole prompt. `text_spans` are where rows of no visual tokens start and
    stop, in order, where the route freezes layers. Logits are computed for the last `logits_to_keep` rows: one to go on from, more
    to score an answer. Rows that the cache holds already stand before these: a prompt's beginning, which has run before. A prompt
    may run in parts, whatever its route: all that is dropped, merged, frozen or skipped is known before its first row runs.
    """

    hidden: Tensor
    positions: Tensor
    route: Route
    cache: RequestCache
    text_spans: Spans | None = None
    logits_to_keep: int = 1

    def __len__(self) -> int:
        return len(self.positions)

    def query_spans(self, layer: int) -> Spans:
        """Where the rows that attend and change in a layer start and stop, in order; all the others are read only."""
        if layer == self.route.last_layer and len(self) > self.logits_to_keep:
            return ((len(self) - self.logits_to_keep, len(self)),)
        if self.text_spans is not None and layer in self.route.frozen_layers:
            return self.text_spans
        return ((0, len(self)),)

    def query_rows(self, layer: int) -> Tensor | None:
        """The same as indices; None for all rows."""
        spans = self.query_spans(layer)
        if spans == ((0, len(self)),):
            return None
        return upload([row for start, stop in spans for row in range(start, stop)], self.positions.device)

    def first(self, rows: int) -> SequenceInput:
        """A prompt's beginning, of which no logits are wanted unless it is the whole."""
        return self if rows >= len(self) else replace(self._part(0, rows), logits_to_keep=0)

    def behind(self, rows: int) -> SequenceInput:
        """A prompt without its first rows: the cache holds them."""
        return self._part(rows, len(self))

    def _part(self, start: int, stop: int) -> SequenceInput:
        text = self.text_spans
        if text is not None:
            cut = [(max(first, start) - start, min(last, stop) - start) for first, last in text]
            text = tuple((first, last) for first, last in cut if first < last)
        return replace(self, hidden=self.hidden[start:stop], positions=self.positions[start:stop], text_spans=text)

    @property
    def logit_rows(self) -> Tensor:
        return torch.arange(len(self) - self.logits_to_keep, len(self), device=self.positions.device)


def prefill_input(
    model: Llava, ids: Tensor, visual: Tensor | None, route: Route, cache: RequestCache, logits_to_keep: int = 1
) -> SequenceInput:
    """The rows of a prompt: `ids` [n] with image tokens expanded, whose embeddings are `visual` [visual_tokens, width]."""
    is_visual = ids == model.config.image_token_id
    hidden, positions = model.embed(ids), torch.arange(len(ids), device=ids.device)
    if visual is not None:
        hidden[is_visual] = visual.to(hidden.dtype)
    if route.dropped:
        kept = ~is_visual
        kept[is_visual.nonzero()[list(route.kept_tokens), 0]] = True
        hidden, positions, is_visual = hidden[kept], positions[kept], is_visual[kept]
    if route.token_sizes:
        sizes = torch.ones(len(positions), dtype=hidden.dtype, device=ids.device)
        sizes[is_visual] = torch.tensor(route.token_sizes, dtype=hidden.dtype, device=ids.device)
        cache.set_bias(sizes.log())
    text_spans = _spans(~is_visual) if route.frozen_layers else None
    return SequenceInput(hidden, positions, route, cache, text_spans, logits_to_keep)


def _spans(chosen: Tensor) -> Spans:
    """Where the true ones of a row of bools start and stop."""
    edges = F.pad(chosen.int(), (1, 1)).diff().nonzero()[:, 0].tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def decode_input(model: Llava, ids: Tensor, position: int, route: Route, cache: RequestCache) -> SequenceInput:
    """The row of one new token, `ids` [1], at its position in the whole prompt and answer."""
    return decode_inputs(model, ids, [position], [(route, cache)])[0]


def decode_inputs(
    model: Llava, ids: Tensor, positions: Sequence[int], requests: Sequence[tuple[Route, RequestCache]]
) -> list[SequenceInput]:
    """The same of several requests, `ids` [requests], at once."""
    hidden, places = model.embed(ids).split(1), upload(positions, ids.device).split(1)
    return [SequenceInput(*row, *request) for row, request in zip(zip(hidden, places, strict=True), requests, strict=True)]


@torch.inference_mode()
def forward(
    model: Llava, batch: Sequence[SequenceInput], layer_hook: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """Run one pass; returns float32 logits [sum of logits_to_keep, vocab] of each request's last rows.

    `layer_hook(layer, hidden)` is called with the rows [rows, width] before each layer.
    """
    decode = None if layer_hook else model.decode_plan
    if decode and decode.takes(batch):
        return decode.step(batch)
    hidden = torch.cat([sequence.hidden for sequence in batch])
    cos, sin = model.rope(torch.cat([sequence.positions for sequence in batch]))
    for index, layer in enumerate(model.decoder_layers):
        if layer_hook:
            layer_hook(index, hidden)
        if any(sequence.route.layers[index] for sequence in batch):
            hidden = _layer(model, layer, index, batch, hidden, cos, sin)
    return model.logits(hidden[_packed(batch, [sequence.logit_rows for sequence in batch])])


def _layer(
    model: Llava, layer: DecoderLayer, index: int, batch: Sequence[SequenceInput], hidden: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """One layer: the rows of the requests that run it are read, their query rows change."""
    runs = [sequence.route.layers[index] for sequence in batch]
    running = [sequence for sequence in batch if sequence.route.layers[index]]
    queries = [sequence.query_rows(index) for sequence in running]
    x = hidden
    rows = None  # all of them
    if len(running) < len(batch):
        rows = _packed(batch, [None if run else hidden.new_empty(0, dtype=torch.long) for run in runs])
        x, cos, sin = hidden[rows], cos[rows], sin[rows]
    qkv = layer.qkv(rms_norm(x, layer.input_norm, model.eps))
    mixed = _attention(model, layer, index, qkv, cos, sin, running, queries)
    if any(query is not None for query in queries):
        changing = _packed(running, queries)
        if not len(changing):  # parts of prompts, of which only keys and values are wanted
            return hidden
        rows = changing if rows is None else rows[changing]
        x = hidden[rows]
    x = layer.behind_attention(x, mixed, model.eps)
    return x if rows is None else hidden.index_copy(0, rows, x)


def _attention(
    model: Llava, layer: DecoderLayer, index: int, qkv: Tensor, cos: Tensor, sin: Tensor, batch: Sequence[SequenceInput],
    queries: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """Rotate, cache and attend: qkv [rows, (heads + 2 kv_heads) * dim] to [query rows, heads * dim]."""
    heads, kv_heads, dim = layer.heads, layer.kv_heads, model.head_dim
    scale = dim**-0.5
    qkv = qkv.view(len(qkv), heads + 2 * kv_heads, dim)
    rotated = apply_rope(qkv[:, : heads + kv_heads], cos, sin)
    query, key, value = rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :]
    lengths = [len(sequence) for sequence in batch]
    if max(lengths) == 1 and all(rows is None for rows in queries) and isinstance(model.decode_plan, GraphPlan):
        from models.kernels.attention_triton import append_and_attend

        table = upload([sequence.cache.append_row(index) for sequence in batch], query.device)
        return append_and_attend(query, key, value, table, 0, scale).flatten(1)
    new = zip(batch, key.split(lengths), value.split(lengths), strict=True)
    cached = [sequence.cache.append(index, k, v) for sequence, k, v in new]
    biases = [sequence.cache.bias(index) for sequence in batch]
    if packs(query, kv_heads):
        spans = [sequence.query_spans(index) for sequence in batch]
        return _packed_attention(query.split(lengths), cached, biases, spans, scale).flatten(1)
    mixed = []
    for q, (keys, values), bias, rows in zip(query.split(lengths), cached, biases, queries, strict=True):
        places = None if rows is None else rows + (keys.shape[1] - len(q))
        q = q if rows is None else q[rows]
        if len(q):
            q = attend(q, keys, values, scale=scale, query_positions=places, bias=bias)
        mixed.append(q.reshape(-1, heads * dim))
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def _packed_attention(
    queries: Sequence[Tensor], cached: Sequence[tuple[Tensor, Tensor]], biases: Sequence[Tensor | None], spans: Sequence[Spans],
    scale: float,
) -> Tensor:  # fmt: skip
    """Attention of all requests' spans of query rows in one call, each over the rows up to its own last: [rows, heads, dim]."""
    biased = any(bias is not None for bias in biases)
    rows, keys, values, added = [], [], [], []
    for query, (all_keys, all_values), bias, own in zip(queries, cached, biases, spans, strict=True):
        for start, stop in own:
            if start == stop:  # a part of a prompt, of which only keys and values are wanted
                continue
            length = all_keys.shape[1] - len(query) + stop
            rows.append(query[start:stop])
            keys.append(all_keys[:, :length].transpose(0, 1))
            values.append(all_values[:, :length].transpose(0, 1))
            if biased:
                added.append(query.new_zeros(length) if bias is None else bias[:length])
    if not rows:
        return queries[0][:0]
    counts, lengths = ([len(part) for part in parts] for parts in (rows, keys))
    bias = torch.cat(added) if biased else None
    return attend_packed(torch.cat(rows), torch.cat(keys), torch.cat(values), counts, lengths, scale=scale, bias=bias)


def _packed(batch: Sequence[SequenceInput], rows: Sequence[Tensor | None]) -> Tensor:
    """Indices among the packed rows of each request's `rows`; None for all of a request's."""
    parts, start = [], 0
    for sequence, chosen in zip(batch, rows, strict=True):
        if chosen is None:
            chosen = torch.arange(len(sequence), device=sequence.positions.device)
        parts.append(chosen + start)
        start += len(sequence)
    return torch.cat(parts)
