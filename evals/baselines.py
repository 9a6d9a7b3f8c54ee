"""Other ways to leave out visual tokens, to compare with. Nothing here serves."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from models.flops import flops_ratio
from models.forward import SequenceInput, forward, prefill_input
from models.llava import Llava
from models.ops import apply_rope, rms_norm
from models.route import Route

FASTV_LAYER = 2


def late_route(model: Llava, visual: int, kept: Iterable[int]) -> Route:
    """The layers from FASTV_LAYER on, with the visual tokens that are `kept`."""
    return Route(visual, tuple(kept), tuple(layer >= FASTV_LAYER for layer in range(model.num_layers)))


def fastv_ratio(model: Llava, prompt: int, keep: int) -> float:
    """FLOPs ratio of FastV for a prompt of one image: the late layers alone save something."""
    visual = model.visual_tokens_per_image
    whole, few = (flops_ratio(model.config, late_route(model, visual, range(n)), prompt) for n in (visual, keep))
    return 1 - whole + few


@torch.inference_mode()
def fastv(model: Llava, ids: Tensor, visual: Tensor, keep: int, logits_to_keep: int) -> tuple[Tensor, tuple[int, ...]]:
    """FastV (arXiv 2403.06764): from layer 2 on, the `keep` visual tokens that the prompt's last row attends to most in layer 1.

    `ids` are the prompt and all but the last of `logits_to_keep` answer tokens. Returns the answer's logits, and which were kept.
    """
    is_visual, last = ids == model.config.image_token_id, len(ids) - logits_to_keep
    full = Route.full(len(visual), model.num_layers)
    cache = model.new_cache(full.rows(len(ids)))
    inputs: list[Tensor] = []
    forward(model, [prefill_input(model, ids, visual, full, cache)], layer_hook=lambda _, hidden: inputs.append(hidden))
    layer = model.decoder_layers[FASTV_LAYER - 1]
    qkv = layer.qkv(rms_norm(inputs[FASTV_LAYER - 1][last : last + 1], layer.input_norm, model.eps)).view(1, -1, model.head_dim)
    query = apply_rope(qkv[:, : layer.heads], *model.rope(torch.tensor([last]))).view(layer.kv_heads, -1, model.head_dim)
    scores = (query @ cache.keys(FASTV_LAYER - 1)[:, : last + 1].transpose(1, 2)).float() * model.head_dim**-0.5
    attention = scores.softmax(-1).mean((0, 1))[is_visual[: last + 1]]
    kept = tuple(attention.topk(keep).indices.sort().values.tolist())
    rows = ~is_visual
    rows[is_visual.nonzero()[list(kept), 0]] = True
    positions, route = rows.nonzero()[:, 0], late_route(model, len(visual), kept)
    late = SequenceInput(inputs[FASTV_LAYER][rows], positions, route, model.new_cache(route.rows(len(ids))), None, logits_to_keep)
    return forward(model, [late]), kept
