"""Other ways to leave out visual tokens, to compare with. Of these the server offers `merging` alone."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from models.flops import flops_ratio
from models.forward import SequenceInput, forward, prefill_input
from models.llava import Llava
from models.ops import apply_rope, rms_norm
from models.route import Route
from models.vision.features import ImageFeatures
from pruning.dynamic.token_merging import KeptTokens, farthest_first, merge_tokens

TOKEN_BASELINES = ("merging", "divprune", "cls_diversity", "uniform", "random", "pooling")
FASTV_LAYER = 2


def keep_tokens(policy: str, image: ImageFeatures, keep: int, seed: int) -> KeptTokens:
    """Choose `keep` of one image's visual tokens. `merging` and `pooling` change those that stay: each becomes a mean."""
    tokens = image.tokens[0]
    total = len(tokens)
    if keep >= total:
        return KeptTokens.all(tokens)
    if policy == "merging":
        return merge_tokens(tokens, keep)
    if policy == "divprune":
        return KeptTokens(farthest_first(cosine(tokens), keep), tokens)
    if policy == "cls_diversity":
        if image.attention is None:
            raise ValueError("cls_diversity needs a class token, and this vision tower has none; name another policy")
        return KeptTokens(cls_diversity(tokens, image.attention[0], keep).sort().values, tokens)
    if policy == "random":
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        return KeptTokens(order[:keep].sort().values.to(tokens.device), tokens)
    if policy == "uniform":
        return KeptTokens(uniform(total, keep).to(tokens.device), tokens)
    if policy == "pooling":
        return pooling(tokens, keep)
    raise ValueError(f"policy {policy!r} is not one of {', '.join(TOKEN_BASELINES)}")


def cosine(tokens: Tensor) -> Tensor:
    """1 - cosine between tokens [n, width]: float32 [n, n]."""
    unit = F.normalize(tokens.float(), dim=-1)
    return 1 - unit @ unit.mT


def cls_diversity(tokens: Tensor, attention: Tensor, keep: int, salient: float = 0.5) -> Tensor:
    """Half by the class token's attention, the rest farthest-first from what is chosen (cosine distance).

    Ours, after VisPruner (arXiv 2412.01818: attention, then diversity) and DivPrune (2503.02175: max-min distance).
    """
    first = max(1, round(keep * salient))
    picks = [attention.topk(first).indices]
    distance = cosine(tokens)
    nearest = distance[picks[0]].amin(0).index_fill(0, picks[0], -torch.inf)
    for _ in range(keep - first):
        pick = nearest.argmax()
        picks.append(pick[None])
        nearest = torch.minimum(nearest, distance[pick]).index_fill(0, pick, -torch.inf)
    return torch.cat(picks)


def uniform(total: int, keep: int) -> Tensor:
    """`keep` tokens spread evenly over the picture: a grid as near to square as the number allows."""
    side = round(total**0.5)
    if side * side != total:
        return torch.linspace(0, total - 1, keep).round().long()
    rows = max(1, min(side, round(keep**0.5)))
    kept = []
    for row in range(rows):
        columns = keep * (row + 1) // rows - keep * row // rows
        y = int((row + 0.5) * side / rows)
        kept += [y * side + int((column + 0.5) * side / columns) for column in range(columns)]
    return torch.tensor(sorted(set(kept)))


def pooling(tokens: Tensor, keep: int) -> KeptTokens:
    """Average square cells of the grid; each cell's mean stands at its center's place. At most `keep` cells."""
    total = len(tokens)
    side = round(total**0.5)
    if side * side != total:
        return KeptTokens(uniform(total, keep).to(tokens.device), tokens)
    cell = next(c for c in range(1, side + 1) if ceil(side / c) ** 2 <= keep)
    grid = tokens.T.reshape(1, -1, side, side)
    means = F.avg_pool2d(grid.float(), cell, ceil_mode=True)[0].flatten(1).T.to(tokens.dtype)
    centers = [min(start + cell // 2, side - 1) for start in range(0, side, cell)]
    indices = torch.tensor([y * side + x for y in centers for x in centers], device=tokens.device)
    pooled = tokens.clone()
    pooled[indices] = means
    return KeptTokens(indices, pooled)


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
