"""The packed forward: all requests' rows side by side, each running only what its route keeps.

Hidden states are [rows, width] for prompts and single new tokens alike. A dropped visual token is a row that is not selected;
a skipped layer is a layer run on the other requests' rows only. Nothing is padded, and no row is computed that nobody reads:
in a request's last layer a prompt shrinks to the one row whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import kernels
from models.attention import attend
from models.kv_cache import RequestCache
from models.llava import DecoderLayer, Llava
from models.ops import apply_rope, rms_norm, swiglu
from models.route import Route


@dataclass
class SequenceInput:
    """What one request brings to a pass: its new rows, and where they stand.

    hidden [n, width]; positions [n], int64, the original ones. n is the whole prompt, or 1 when decoding. For a prompt that
    drops tokens, `kept` [m] are the indices of the rows that stay from `route.drop_layer` on; `text_rows` are the indices of the
    rows that are no visual tokens, where the route freezes layers. Logits are computed for the last `logits_to_keep` rows: one to
    go on from, more to score an answer.
    """

    hidden: Tensor
    positions: Tensor
    route: Route
    cache: RequestCache
    kept: Tensor | None = None
    text_rows: Tensor | None = None
    logits_to_keep: int = 1


def prefill_input(
    model: Llava, ids: Tensor, visual: Tensor | None, route: Route, cache: RequestCache, logits_to_keep: int = 1
) -> SequenceInput:
    """The rows of a prompt: `ids` [n] with image tokens expanded, `visual` [visual_tokens, width] to stand in their places."""
    is_visual = ids == model.config.image_token_id
    hidden = model.embed(ids)
    if visual is not None:
        hidden[is_visual] = visual.to(hidden.dtype)
    work = SequenceInput(hidden, torch.arange(len(ids), device=ids.device), route, cache, logits_to_keep=logits_to_keep)
    if route.dropped:
        stays = ~is_visual
        places = is_visual.nonzero()[:, 0]
        stays[places[torch.tensor(route.kept_tokens, device=ids.device, dtype=torch.long)]] = True
        work.kept = stays.nonzero()[:, 0]
        if route.drop_layer == 0:
            work.hidden, work.positions, is_visual = hidden[work.kept], work.positions[work.kept], is_visual[work.kept]
            work.kept = None
    if route.token_sizes:
        sizes = torch.ones(len(work.positions), dtype=hidden.dtype, device=ids.device)
        sizes[is_visual] = torch.tensor(route.token_sizes, dtype=hidden.dtype, device=ids.device)
        cache.weigh(sizes.log())
    if route.frozen_layers:
        work.text_rows = (~is_visual).nonzero()[:, 0]
    return work


def decode_input(model: Llava, ids: Tensor, position: int, route: Route, cache: RequestCache) -> SequenceInput:
    """The row of one new token, `ids` [1], at its original position (dropped tokens keep theirs)."""
    return SequenceInput(model.embed(ids), torch.tensor([position], device=ids.device), route, cache)


@torch.inference_mode()
def forward(model: Llava, batch: Sequence[SequenceInput], layer_hook: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Run one pass; returns float32 logits [sum of logits_to_keep, vocab] of each request's last rows.

    `layer_hook(layer, hidden)` is shown the rows before each layer: calibration reads there, nothing else needs it.
    """
    hidden = torch.cat([work.hidden for work in batch])
    cos, sin = model.rope(torch.cat([work.positions for work in batch]))
    counts = [len(work.positions) for work in batch]
    texts = [work.text_rows for work in batch]
    last_layers = [max(i for i, runs in enumerate(work.route.layers) if runs) for work in batch]
    for layer, block in enumerate(model.decoder_layers):
        leaving = [w.kept if w.route.drop_layer == layer else None for w in batch]
        if any(kept is not None for kept in leaving):
            hidden, cos, sin, counts = _leave(hidden, cos, sin, counts, leaving)
            texts = [_among(text, kept) for text, kept in zip(texts, leaving, strict=True)]
        if layer_hook:
            layer_hook(layer, hidden)
        running = [i for i, work in enumerate(batch) if work.route.layers[layer]]
        if not running:
            continue
        tails = [
            torch.arange(n - work.logits_to_keep, n, device=hidden.device) if n > work.logits_to_keep and last == layer else None
            for n, work, last in zip(counts, batch, last_layers, strict=True)
        ]
        asked = [
            tail if tail is not None else text if layer in work.route.frozen_layers else None
            for tail, text, work in zip(tails, texts, batch, strict=True)
        ]
        hidden = _layer(model, block, layer, [(batch[i], counts[i], asked[i]) for i in running], hidden, cos, sin,
                        _select(counts, running, hidden.device) if len(running) < len(batch) else None)  # fmt: skip
        if any(tail is not None for tail in tails):
            hidden, cos, sin, counts = _leave(hidden, cos, sin, counts, tails)
    return model.logits(hidden)


Part = tuple[SequenceInput, int, Tensor | None]
"""A request in a layer: how many rows it has there, and which of them ask and go on; all of them if None."""


def _layer(
    model: Llava, block: DecoderLayer, layer: int, parts: list[Part], hidden: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None
) -> Tensor:
    """One layer on `rows` of `hidden`, or on all of them: every row is seen, the rows that ask are changed."""
    x, c, s = (hidden, cos, sin) if rows is None else (hidden[rows], cos[rows], sin[rows])
    qkv = block.qkv(rms_norm(x, block.input_norm, model.eps))
    mixed = _attention(model, block, layer, qkv, c, s, parts)
    if any(asked is not None for _, _, asked in parts):
        asking = _rows([count for _, count, _ in parts], [asked for _, _, asked in parts], hidden.device)
        rows = asking if rows is None else rows[asking]
        x = hidden[rows]
    x = block.out(mixed).add_(x)
    x = block.down(swiglu(block.gate_up(rms_norm(x, block.post_norm, model.eps)))).add_(x)
    return x if rows is None else hidden.index_copy(0, rows, x)


def _attention(model: Llava, block: DecoderLayer, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, parts: list[Part]) -> Tensor:
    """Rotate, remember and attend, request by request: qkv [rows, (heads + 2 kv_heads) * dim] to [asking, heads * dim]."""
    heads, kv_heads, dim = block.heads, block.kv_heads, model.head_dim
    scale = dim**-0.5
    qkv = qkv.view(len(qkv), heads + 2 * kv_heads, dim)
    rotated = apply_rope(qkv[:, : heads + kv_heads], cos, sin)
    query, key, value = rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :]
    rows = [count for _, count, _ in parts]
    new = zip(key.split(rows), value.split(rows), strict=True)
    seen = [work.cache.append(layer, k, v) for (work, _, _), (k, v) in zip(parts, new, strict=True)]
    biases = [work.cache.bias(layer) for work, _, _ in parts]
    if max(rows) == 1 and kernels.can_decode_attention(query) and (native := kernels.library()):
        return kernels.decode_attention(native, query, seen, biases, scale).view(-1, heads * dim)
    mixed = []
    for own, (keys, values), bias, (_, _, asked) in zip(query.split(rows), seen, biases, parts, strict=True):
        own = own if asked is None else own[asked]
        mixed.append(attend(own, keys, values, scale=scale, query_positions=asked, bias=bias).reshape(-1, heads * dim))
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def _leave(
    hidden: Tensor, cos: Tensor, sin: Tensor, counts: list[int], kept: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """All but the kept rows go."""
    rows = _rows(counts, kept, hidden.device)
    return hidden[rows], cos[rows], sin[rows], [n if k is None else len(k) for n, k in zip(counts, kept, strict=True)]


def _among(rows: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """Where `rows`, which all stay, stand among the kept ones."""
    return rows if rows is None or kept is None else torch.searchsorted(kept, rows)


def _rows(counts: list[int], kept: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Packed indices of the rows that stay: `kept[i]` of request i's rows, or all of them."""
    parts, start = [], 0
    for count, keep in zip(counts, kept, strict=True):
        parts.append(torch.arange(start, start + count, device=device) if keep is None else keep + start)
        start += count
    return torch.cat(parts)


def _select(counts: list[int], chosen: list[int], device: torch.device) -> Tensor:
    """Packed indices of the rows of the chosen requests."""
    starts = [sum(counts[:i]) for i in chosen]
    return torch.cat([torch.arange(s, s + counts[i], device=device) for s, i in zip(starts, chosen, strict=True)])
