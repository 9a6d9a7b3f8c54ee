"""The packed forward: all requests' rows side by side, each running only what its route keeps.

Hidden states are [rows, width] for prompts and single new tokens alike. A dropped visual token is a row that is not selected;
a skipped layer is a layer run on the other requests' rows only. Nothing is padded, and no row is computed that nobody reads:
in a request's last layer a prompt shrinks to the one row whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import attend
from models.kv_cache import RequestCache
from models.llava import Block, Llava
from models.route import Route


@dataclass
class Work:
    """What one request brings to a pass: its new rows, and where they stand.

    hidden [n, width]; positions [n], int64, the original ones. n is the whole prompt, or 1 when decoding. For a prompt that
    drops tokens, `kept` [m] are the indices of the rows that stay from `route.drop_layer` on.
    """

    hidden: Tensor
    positions: Tensor
    route: Route
    cache: RequestCache
    kept: Tensor | None = None


def prompt_work(model: Llava, ids: Tensor, visual: Tensor | None, route: Route, cache: RequestCache) -> Work:
    """The rows of a prompt: `ids` [n] with image tokens expanded, `visual` [visual_tokens, width] to stand in their places."""
    is_visual = ids == model.config.image_token_id
    hidden = model.embed(ids)
    if visual is not None:
        hidden[is_visual] = visual.to(hidden.dtype)
    positions = torch.arange(len(ids), device=ids.device)
    if not route.dropped:
        return Work(hidden, positions, route, cache)
    stays = ~is_visual
    places = is_visual.nonzero()[:, 0]
    stays[places[torch.tensor(route.kept, device=ids.device, dtype=torch.long)]] = True
    kept = stays.nonzero()[:, 0]
    if route.drop_layer == 0:
        return Work(hidden[kept], positions[kept], route, cache)
    return Work(hidden, positions, route, cache, kept)


def token_work(model: Llava, ids: Tensor, position: int, route: Route, cache: RequestCache) -> Work:
    """The row of one new token, `ids` [1], at its original position (dropped tokens keep theirs)."""
    return Work(model.embed(ids), torch.tensor([position], device=ids.device), route, cache)


@torch.inference_mode()
def forward(model: Llava, batch: Sequence[Work], watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Run one pass; returns float32 logits [requests, vocab] of each request's last row.

    `watch(layer, hidden)` is shown the rows before each layer: calibration reads there, nothing else needs it.
    """
    hidden = torch.cat([work.hidden for work in batch])
    cos, sin = model.rope(torch.cat([work.positions for work in batch]))
    counts = [len(work.positions) for work in batch]
    last_layers = [max(i for i, runs in enumerate(work.route.layers) if runs) for work in batch]
    for layer, block in enumerate(model.blocks):
        leaving = [w.kept if w.route.drop_layer == layer else None for w in batch]
        if any(kept is not None for kept in leaving):
            rows = _rows(counts, leaving, hidden.device)
            hidden, cos, sin = hidden[rows], cos[rows], sin[rows]
            counts = [n if kept is None else len(kept) for n, kept in zip(counts, leaving, strict=True)]
        if watch:
            watch(layer, hidden)
        running = [i for i, work in enumerate(batch) if work.route.layers[layer]]
        if not running:
            continue
        ending = [counts[i] > 1 and last_layers[i] == layer for i in range(len(batch))]
        hidden, cos, sin, counts = _layer(model, block, layer, batch, running, ending, hidden, cos, sin, counts)
    return model.logits(hidden)


def _layer(
    model: Llava, block: Block, layer: int, batch: Sequence[Work], running: list[int], ending: list[bool],
    hidden: Tensor, cos: Tensor, sin: Tensor, counts: list[int],
) -> tuple[Tensor, Tensor, Tensor, list[int]]:  # fmt: skip
    """One layer on the rows of the requests in `running`; a request that is `ending` keeps only its last row after attention."""
    everyone = len(running) == len(batch)
    rows = None if everyone else _select(counts, running, hidden.device)
    x, c, s = (hidden, cos, sin) if rows is None else (hidden[rows], cos[rows], sin[rows])
    qkv = block.qkv(F.rms_norm(x, x.shape[-1:], block.input_norm, model.eps))
    mixed = _attention(model, block, layer, qkv, c, s, [(batch[i], counts[i], ending[i]) for i in running])
    if any(ending):
        tails = [torch.tensor([n - 1], device=hidden.device) if end else None for n, end in zip(counts, ending, strict=True)]
        left = _rows(counts, tails, hidden.device)
        hidden, cos, sin = hidden[left], cos[left], sin[left]
        counts = [1 if end else n for n, end in zip(counts, ending, strict=True)]
        rows = None if everyone else _select(counts, running, hidden.device)
        x = hidden if rows is None else hidden[rows]
    x = block.out(mixed).add_(x)
    gate, up = block.gate_up(F.rms_norm(x, x.shape[-1:], block.post_norm, model.eps)).chunk(2, dim=-1)
    x = block.down(F.silu(gate).mul_(up)).add_(x)
    if rows is None:
        return x, cos, sin, counts
    return hidden.index_copy(0, rows, x), cos, sin, counts


def _attention(
    model: Llava, block: Block, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, parts: list[tuple[Work, int, bool]]
) -> Tensor:
    """Rotate, remember and attend, request by request: qkv [rows, (heads + 2 kv_heads) * dim] to [rows left, heads * dim]."""
    heads, kv_heads, dim = block.heads, block.kv_heads, model.head_dim
    scale = dim**-0.5
    qkv = qkv.view(len(qkv), heads + 2 * kv_heads, dim)
    rotated = rotate(qkv[:, : heads + kv_heads], cos, sin)
    query, key, value = rotated[:, :heads], rotated[:, heads:], qkv[:, heads + kv_heads :]
    mixed, start = [], 0
    for work, count, ends in parts:
        stop = start + count
        keys, values = work.cache.append(layer, key[start:stop], value[start:stop])
        asked = query[stop - 1 : stop] if ends else query[start:stop]
        mixed.append(attend(asked, keys, values, scale=scale).reshape(-1, heads * dim))
        start = stop
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [rows, heads, dim] (halves, as in LLaMA)."""
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


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
