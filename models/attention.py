"""Attention of one request's rows over its keys and values: one signature, torch's SDPA behind it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    """Causal attention of the last `rows` positions over all `length` of them.

    query [rows, heads, dim]; keys, values [kv_heads, length, dim] with heads a multiple of kv_heads; returns [rows, heads, dim].
    `rows` is 1 (decode, or the last row of a prompt) or `length` (prefill): there is nothing between them to serve.
    """
    rows, heads, dim = query.shape
    kv_heads, length, _ = keys.shape
    if rows == 1:
        # The query heads that share a key head become its rows: no copy of keys per head, no mask.
        grouped = query.view(1, kv_heads, heads // kv_heads, dim)
        out = F.scaled_dot_product_attention(grouped, keys[None], values[None], scale=scale)
        return out.reshape(1, heads, dim)
    if rows != length:
        raise ValueError(f"{rows} query rows over {length} keys: only 1 or all of them")
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], is_causal=True, enable_gqa=heads != kv_heads, scale=scale
    )
    return out[0].transpose(0, 1)
