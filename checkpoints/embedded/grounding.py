"""A training loss that points words at the picture: what a color or a shape word attends to, in a few heads, is where it stands.

A small language model learns from captions to say what stands at a place, and nearly never, from answers alone, to find the place
of what a question names. Shown once where to look, it answers within some hundred steps. (Ours; supervision of attention is an
old remedy of captioning.)
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
class Pointer:
    """A head, and which words it points from: colors, shapes, or shapes after a color (where both must be)."""

    layer: int
    head: int
    color: bool
    what: bool


POINTERS = (
    Pointer(1, 0, color=True, what=False),
    Pointer(1, 2, color=False, what=True),
    Pointer(2, 0, color=True, what=True),
    Pointer(3, 2, color=True, what=True),
)


class Words(nn.Module):
    """The color and the shape that each token of the vocabulary names: classes of the patch labels, 0 for none."""

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


def pointing_loss(
    model: LlamaModel, states: list[Tensor], batch: dict[str, Tensor], words: Words, mask: Tensor, rope: tuple[Tensor, Tensor],
    visual: slice, pool: int,
) -> Tensor:  # fmt: skip
    """Mean of -log(attention on the patches meant); a word for what is not there points at the first token.

    states: the input [B, n, width] of each layer; mask [B, 1, n, n], additive; batch: `ids` [B, n], `patches` [B, 3, GRID, GRID].
    """
    ids = batch["ids"]
    color, what = words.color[ids], words.what[ids]
    before = F.pad(color, (1, 0))[:, :-1]
    losses = []
    for pointer in POINTERS:
        if pointer.color and pointer.what:
            found, wanted = (before > 0) & (what > 0), (before, what)
        else:
            found = color > 0 if pointer.color else what > 0
            wanted = (color, torch.zeros_like(what)) if pointer.color else (torch.zeros_like(color), what)
        row, at = found.nonzero(as_tuple=True)
        if not len(row):
            continue
        target = torch.zeros(len(row), ids.shape[1], dtype=torch.bool, device=ids.device)
        target[:, visual] = _places(batch["patches"], row, wanted[0][row, at], wanted[1][row, at], pool)
        target[:, 0] = ~target.any(1)
        attention = _attention(model, pointer, states[pointer.layer], rope, row, at, mask)
        losses.append(-(attention * target).sum(1).clamp(min=1e-6).log().mean())
    return torch.stack(losses).mean() if losses else ids.new_zeros((), dtype=torch.float32)


def _places(patches: Tensor, row: Tensor, color: Tensor, what: Tensor, pool: int) -> Tensor:
    """Which visual tokens hold a color (0: any) and a shape (0: any): bool [words, visual tokens]."""
    shown = patches[row]
    there = ((color == 0)[:, None, None] | (shown[:, 1] == color[:, None, None])) & (
        (what == 0)[:, None, None] | (shown[:, 0] == what[:, None, None])
    )
    return F.max_pool2d(there[:, None].float(), pool).flatten(1) > 0


def _attention(
    model: LlamaModel, pointer: Pointer, hidden: Tensor, rope: tuple[Tensor, Tensor], row: Tensor, at: Tensor, mask: Tensor
) -> Tensor:
    """One head's attention of the tokens `at` of sequences `row`: [words, n]."""
    layer = model.layers[pointer.layer]
    dim, groups = layer.self_attn.head_dim, layer.self_attn.num_key_value_groups
    normed = layer.input_layernorm(hidden)
    own, shared = pointer.head * dim, pointer.head // groups * dim
    query = F.linear(normed, layer.self_attn.q_proj.weight[own : own + dim])[:, None]
    key = F.linear(normed, layer.self_attn.k_proj.weight[shared : shared + dim])[:, None]
    query, key = apply_rotary_pos_emb(query, key, *rope)
    scores = torch.einsum("wd,wnd->wn", query[row, 0, at].float(), key[row, 0].float()) * dim**-0.5
    return (scores + mask[row, 0, at].float()).softmax(-1)
