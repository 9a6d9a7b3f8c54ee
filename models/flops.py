"""Arithmetic of a prefill, so that a receipt can say what share of the dense one a route runs."""

from __future__ import annotations

from transformers import LlavaConfig

from models.layer_shapes import head_dim, layer_shapes, query_heads
from models.route import Route


def prefill_flops(config: LlavaConfig, route: Route, prompt: int) -> int:
    """Multiply-adds times two of the language model's prefill for `prompt` tokens on a route: matrices, attention, head.

    The vision tower is not in it: it costs the same on every route.
    """
    text = config.text_config
    width, dim = text.hidden_size, head_dim(text)
    total = width * text.vocab_size
    last = max(layer for layer, runs in enumerate(route.layers) if runs)
    for layer, (rows, has) in enumerate(zip(route.rows(prompt), layer_shapes(text), strict=True)):
        heads = has.kv_heads * query_heads(text)
        qkv = width * dim * (heads + 2 * has.kv_heads)
        rest = width * dim * heads + 3 * width * has.ffn
        # In the last layer only one row goes on after the keys and values are made, in others all that do not stay as they are.
        asked = rows
        if layer == last:
            asked = min(rows, 1)
        elif layer in route.frozen_layers:
            asked -= len(route.kept_tokens) if layer >= route.drop_layer else route.visual_tokens
        # Scores and values; where all rows ask, causal attention reads half of rows x rows.
        pairs = rows * rows if asked == rows else 2 * asked * rows
        total += rows * qkv + asked * rest + pairs * heads * dim
    return 2 * int(total)


def flops_ratio(config: LlavaConfig, route: Route, prompt: int, router: int = 0) -> float:
    """A route's prefill FLOPs and those that its `router` took, over the dense ones, language model only."""
    dense = Route.full(route.visual_tokens, len(route.layers))
    return (prefill_flops(config, route, prompt) + router) / prefill_flops(config, dense, prompt)
