"""FLOPs of a prefill, and the share of the dense one that a route runs."""

from __future__ import annotations

from transformers import PreTrainedConfig

from models.layer_shapes import head_dim, layer_shapes, query_heads
from models.route import Route


def prefill_flops(config: PreTrainedConfig, route: Route, prompt: int) -> int:
    """FLOPs of the language model's prefill of `prompt` tokens on a route: matrices, attention and head, two for a multiply-add.

    The vision tower is left out: it costs the same on every route.
    """
    text = config.text_config
    width, dim = text.hidden_size, head_dim(text)
    total = width * text.vocab_size
    for layer, (rows, shape) in enumerate(zip(route.rows(prompt), layer_shapes(text), strict=True)):
        heads = shape.kv_heads * query_heads(text)
        qkv = width * dim * (heads + 2 * shape.kv_heads)
        rest = width * dim * heads + 3 * width * shape.ffn
        # Rows that attend and change: one in the last layer, text rows where visual ones are frozen, else all.
        queries = rows
        if layer == route.last_layer:
            queries = min(rows, 1)
        elif layer in route.frozen_layers:
            queries -= len(route.kept_tokens)
        # Scores and values; where all rows attend, causal attention reads half of rows x rows.
        pairs = rows * rows if queries == rows else 2 * queries * rows
        total += rows * qkv + queries * rest + pairs * heads * dim
    return 2 * int(total)


def flops_ratio(config: PreTrainedConfig, route: Route, prompt: int, router: int = 0) -> float:
    """FLOPs of a route's prefill and of its `router`, over those of the dense prefill."""
    dense = Route.full(route.visual_tokens, len(route.layers))
    return (prefill_flops(config, route, prompt) + router) / prefill_flops(config, dense, prompt)
