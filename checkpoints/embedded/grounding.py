"""Grounding: a training loss on attention. In a few heads, a word for a color or a shape must attend to where that thing is.

From captions, a language model this small learns to say what is at a place. From answers alone, it hardly ever learns to find the
place of what a question names. With this loss it answers such questions after some hundred steps. (Ours; supervised attention is
known from image captioning.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from checkpoints.world import COLORS, WHATS


@dataclass(frozen=True)
class GroundingHead:
    """An attention head, and the words that it grounds: colors, shapes, or shapes after a color (where both must match)."""

    layer: int
    index: int
    color: bool
    what: bool


GROUNDING_HEADS = (
    GroundingHead(1, 0, color=True, what=False),
    GroundingHead(1, 2, color=False, what=True),
    GroundingHead(2, 0, color=True, what=True),
    GroundingHead(3, 2, color=True, what=True),
)


class WordClasses(nn.Module):
    """The color and the shape that each token of the vocabulary names, as classes of the patch labels; 0 for none."""

    color: Tensor  # [vocab] int64
    what: Tensor

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        for name, words in (("color", list(COLORS)), ("what", [w for w in WHATS if len(w) > 1])):
            classes = list(COLORS) if name == "color" else list(WHATS)
            named = torch.zeros(len(tokenizer), dtype=torch.long)
            for word in words:
                for spelled in (word, f" {word}", f" {word}s", f" {word}es"):
                    ids = tokenizer(spelled, add_special_tokens=False).input_ids
                    if len(ids) == 1:
                        named[ids[0]] = classes.index(word) + 1
            self.register_buffer(name, named)


def grounding_loss(
    model: LlamaModel, states: list[Tensor], batch: dict[str, Tensor], words: WordClasses, mask: Tensor,
    rope: tuple[Tensor, Tensor], visual: slice, pool: int,
) -> Tensor:  # fmt: skip
    """Mean of -log(attention on the right patches). A word for what is not in the picture must attend to the first token.

    states: the input [B, n, width] of each layer; mask [B, 1, n, n], additive; batch: `ids` [B, n], `patches` [B, 3, GRID, GRID].
    """
    ids = batch["ids"]
    color, what = words.color[ids], words.what[ids]
    before = F.pad(color, (1, 0))[:, :-1]
    losses = []
    for head in GROUNDING_HEADS:
        if head.color and head.what:
            found, wanted = (before > 0) & (what > 0), (before, what)
        else:
            found = color > 0 if head.color else what > 0
            wanted = (color, torch.zeros_like(what)) if head.color else (torch.zeros_like(color), what)
        sequence, position = found.nonzero(as_tuple=True)
        if not len(sequence):
            continue
        target = torch.zeros(len(sequence), ids.shape[1], dtype=torch.bool, device=ids.device)
        wanted_color, wanted_what = (part[sequence, position] for part in wanted)
        target[:, visual] = _is_shown(batch["patches"], sequence, wanted_color, wanted_what, pool)
        target[:, 0] = ~target.any(1)
        attention = _attention(model, head, states[head.layer], rope, sequence, position, mask)
        losses.append(-(attention * target).sum(1).clamp(min=1e-6).log().mean())
    return torch.stack(losses).mean() if losses else ids.new_zeros((), dtype=torch.float32)


def _is_shown(patches: Tensor, sequence: Tensor, color: Tensor, what: Tensor, pool: int) -> Tensor:
    """Which visual tokens hold a color (0: any) and a shape (0: any): bool [words, visual tokens]."""
    shown = patches[sequence]
    there = ((color == 0)[:, None, None] | (shown[:, 1] == color[:, None, None])) & (
        (what == 0)[:, None, None] | (shown[:, 0] == what[:, None, None])
    )
    return F.max_pool2d(there[:, None].float(), pool).flatten(1) > 0


def _attention(
    model: LlamaModel, head: GroundingHead, hidden: Tensor, rope: tuple[Tensor, Tensor], sequence: Tensor, position: Tensor,
    mask: Tensor,
) -> Tensor:  # fmt: skip
    """One head's attention from the tokens at these positions of these sequences: [words, n]."""
    layer = model.layers[head.layer]
    dim, groups = layer.self_attn.head_dim, layer.self_attn.num_key_value_groups
    normed = layer.input_layernorm(hidden)
    own, shared = head.index * dim, head.index // groups * dim
    query = F.linear(normed, layer.self_attn.q_proj.weight[own : own + dim])[:, None]
    key = F.linear(normed, layer.self_attn.k_proj.weight[shared : shared + dim])[:, None]
    query, key = apply_rotary_pos_emb(query, key, *rope)
    scores = torch.einsum("wd,wnd->wn", query[sequence, 0, position].float(), key[sequence, 0].float()) * dim**-0.5
    return (scores + mask[sequence, 0, position].float()).softmax(-1)
