"""The meta-router: reads picture and question once and serves any budget.

It foresees how much the model will look at each visual token and what it would cost if visual rows passed a layer by; it writes
into the tokens that stay what those that go had to say; and it foresees on which rungs, from few tokens and layers to many, the
answer will stay what it is.

After PAR's meta-router (Pruning All-Rounder, arXiv 2412.06458, figure 3: visual tokens, question and one learnable token a layer
in, a score for each out), with four changes of ours. Attention is bidirectional, so that a visual token's score depends on the
question. The rows are narrow, so that all of it costs under 3 % of a dense prefill. A score is a quantity that can be checked: the
logarithm of the attention that the un-pruned model will pay, or of the divergence that it would suffer (see `gaze`). And tokens
are not dropped: they are merged, and the merged ones are corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.llava import Llava
from models.vision.features import ImageFeatures
from pruning.dynamic.token_merging import Kept, euclidean, farthest_first, means, members, replaced

PERIOD = 100.0
"""Longest wave of the places' encoding, in patches or words."""
STRENGTH = 0.3
"""Weight of the scores beside the logarithm of the distance: 0.15 and 0.6 keep less (validation, docs/log.md)."""

GAINED_AT = (1 / 18, 1 / 9, 1 / 4, 1 / 2)
"""Shares of the tokens at which it is measured how much of what is written is believed."""

MEMBERS, HIDDEN = 4, 64
"""Networks that judge together, and the hidden values of each."""
AMONG = (0.0, 0.25, 0.5, 0.75, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)
"""Quantiles of the attention that is foreseen for a picture's tokens, by which they judge."""

WORDS = 64
"""Most text tokens that a router reads: the end of the prompt, where the question is."""


def words(prompt: Sequence[int], image_token: int) -> list[int]:
    """What of a prompt the router reads: its last text tokens, but none from before the first picture."""
    start = prompt.index(image_token) if image_token in prompt else 0
    return [token for token in prompt[start:] if token != image_token][-WORDS:]


@dataclass(frozen=True)
class Shape:
    """The language model's `width` and `layers`, the router's own width of `rows`, `depth` in layers, and `heads`.

    `rungs`: ways to run a request whose answers it foresees, the whole model aside.
    """

    width: int
    layers: int
    rows: int
    depth: int = 2
    heads: int = 4
    rungs: int = 17

    def document(self) -> dict[str, int]:
        return asdict(self)

    def flops(self, tokens: int, words: int, kept: int) -> int:
        """Multiply-adds times two for a picture of `tokens`, of which `kept` stay, and `words` of a question. Nothing is written
        where all stay."""
        rows = tokens + words + self.layers
        reading = self.width * (tokens + words) + self.depth * self._block(rows, rows)
        if kept >= tokens:
            return 2 * self.rows * reading
        writing = self.width * (tokens + kept) + self.rows * (tokens + kept)
        writing += self.depth * self._block(kept + words, kept + words + tokens)
        return 2 * self.rows * (reading + writing)

    def _block(self, rows: int, seen: int) -> int:
        return rows * 10 * self.rows + seen * 2 * self.rows + 2 * rows * seen


def default_rows(width: int) -> int:
    """The router's width for a model's, in whole heads: an eighth; of a small model up to 64, but no more than a quarter."""
    return max(16, min(width // 32 * 8, max(64, width // 64 * 8)))


class RouterBlock(nn.Module):
    def __init__(self, rows: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(rows), nn.RMSNorm(rows)
        self.query, self.key_value, self.out = nn.Linear(rows, rows), nn.Linear(rows, 2 * rows), nn.Linear(rows, rows)
        self.up, self.down = nn.Linear(rows, 4 * rows), nn.Linear(4 * rows, rows)

    def forward(self, x: Tensor, mask: Tensor | None, beside: Tensor | None = None) -> Tensor:
        """x [batch, n, rows] sees itself and what is `beside` it [batch, m, rows]; `mask` [batch, n + m] tells which are there."""
        seen = self.norm1(x if beside is None else torch.cat([x, beside], 1))
        query = self.query(seen[:, : x.shape[1]]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=None if mask is None else mask[:, None, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Read(NamedTuple):
    """What the router made of a batch of pictures and questions.

    visual [batch, tokens, rows] and words [batch, n, rows]: its own last rows; `present` [batch, n] or None: which words are there.
    looks [batch, tokens], float32: the logarithm of the attention that each visual token will get. costs [batch, layers], float32:
    the logarithm of the divergence if visual rows pass that layer by.
    """

    visual: Tensor
    words: Tensor
    present: Tensor | None
    looks: Tensor
    costs: Tensor


class Writer(nn.Module):
    """Corrects merged tokens, so that the model can tell from them what those that went would have said."""

    gains: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        rows = shape.rows
        self.see, self.mix = nn.Linear(shape.width, rows), nn.Linear(rows, rows)
        self.own, self.size = nn.Linear(rows, rows), nn.Linear(1, rows)
        self.blocks = nn.ModuleList(RouterBlock(rows, shape.heads) for _ in range(shape.depth))
        self.norm, self.out = nn.RMSNorm(rows), nn.Linear(rows, shape.width)
        # It begins by writing nothing: an untrained one leaves the plain means.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        # How much of it is believed at the shares of GAINED_AT. `judge` lowers it where less keeps more answers to questions that
        # were not learned from: the more tokens stay, the less there is to put right.
        self.register_buffer("gains", torch.ones(len(GAINED_AT)))

    def forward(self, read: Read, visual: Tensor, kept: Tensor, shares: Tensor) -> Tensor:
        """The kept tokens' new values, float32 [batch, keep, width]: the mean of what each stands for, and a correction.

        kept [batch, keep], ascending; shares [batch, tokens, keep], see `policies.members`.
        """
        keep, dtype = kept.shape[1], self.see.weight.dtype
        seen = self.see(_normal(visual, dtype)) + self.mix(read.visual)
        own = self.own(seen.take_along_dim(kept[..., None], 1))
        merged = means(seen, shares).to(dtype) + own + self.size(shares.sum(1).log()[..., None].to(dtype))
        x = torch.cat([merged, read.words], 1)
        mask = None if read.present is None else F.pad(F.pad(read.present, (keep, 0), value=True), (0, seen.shape[1]), value=True)
        for block in self.blocks:
            x = block(x, mask, seen)
        scale = visual.float().square().mean((-2, -1), keepdim=True).sqrt()
        out: Tensor = means(visual, shares) + self.gain(keep / visual.shape[1]) * scale * self.out(self.norm(x[:, :keep])).float()
        return out

    def gain(self, share: float) -> float:
        """Between the shares at which it was measured, in proportion; beyond them, as at the nearest."""
        return float(np.interp(share, GAINED_AT, self.gains.tolist()))


class Trust(nn.Module):
    """How likely an answer stays on each rung: small networks that err differently, and the mean of their logits."""

    def __init__(self, features: int, rungs: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter((2 * torch.rand(MEMBERS, features, HIDDEN) - 1) / features**0.5)
        self.bias = nn.Parameter(torch.zeros(MEMBERS, 1, HIDDEN))
        self.out = nn.Parameter((2 * torch.rand(MEMBERS, HIDDEN, rungs) - 1) / HIDDEN**0.5)
        self.level = nn.Parameter(torch.zeros(MEMBERS, 1, rungs))

    def members(self, impressions: Tensor, dropped: float = 0.0) -> Tensor:
        """Each network's logits, [MEMBERS, n, rungs], of impressions [MEMBERS or 1, n, features]; while they learn a share of
        their hidden values is `dropped`."""
        hidden = F.dropout(F.gelu(impressions @ self.hidden + self.bias), dropped, training=dropped > 0)
        return hidden @ self.out + self.level

    def forward(self, impressions: Tensor) -> Tensor:
        """Logits [n, rungs] of impressions [n, features]."""
        return self.members(impressions[None]).mean(0)


class Router(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, rows = shape.width, shape.rows
        self.see, self.read = nn.Linear(width, rows), nn.Linear(width, rows)
        self.layers = nn.Parameter(0.02 * torch.randn(shape.layers, rows))
        self.blocks = nn.ModuleList(RouterBlock(rows, shape.heads) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(rows)
        self.look, self.cost = nn.Linear(rows, 1), nn.Linear(rows, 1)
        self.write = Writer(shape)
        self.trust = Trust(4 * rows + shape.layers + len(AMONG), shape.rungs)

    def forward(self, visual: Tensor, words: Tensor, present: Tensor | None = None) -> Read:
        """Read pictures, one a question.

        visual [batch, tokens, width], projected; words [batch, n, width], the question's embeddings, of which `present` [batch, n]
        are there.
        """
        (batch, tokens, _), n, rows = visual.shape, words.shape[1], self.shape.rows
        dtype = self.see.weight.dtype
        seen = self.see(_normal(visual, dtype)) + grid(tokens, rows).to(visual.device, dtype)
        read = self.read(_normal(words, dtype)) + waves(torch.arange(n), rows).to(visual.device, dtype)
        x = torch.cat([seen, read, self.layers.expand(batch, -1, -1)], 1)
        mask = None if present is None else F.pad(F.pad(present, (tokens, 0), value=True), (0, self.shape.layers), value=True)
        for block in self.blocks:
            x = block(x, mask)
        seen, read, layers = self.norm(x).split([tokens, n, self.shape.layers], 1)
        return Read(seen, read, present, self.look(seen)[..., 0].float(), self.cost(layers)[..., 0].float())

    def impression(self, read: Read) -> Tensor:
        """What `trust` judges by, float32 [batch, features]: the mean and the largest values of words and of visual rows, what it
        would cost to pass the layers by, and how the attention spreads."""
        words, visual, looks = read.words.float(), read.visual.float(), read.looks
        present = torch.ones_like(words[..., 0]) if read.present is None else read.present.float()
        words = words * present[..., None]
        asked = words.sum(1) / present.sum(1, keepdim=True).clamp_min(1)
        most = F.pad(words, (0, 0, 0, 1)).amax(1)  # of none it is zero
        spread = looks.quantile(torch.tensor(AMONG, device=looks.device), dim=1).T
        return torch.cat([asked, most, visual.mean(1), visual.amax(1), read.costs, spread], -1)

    def serving(self, dtype: torch.dtype) -> Router:
        """A copy as it serves: in the model's dtype, which is faster; what it trusts stays in float32, for thresholds are fine."""
        copy = deepcopy(self).requires_grad_(False).eval().to(dtype)
        copy.trust.float()
        copy.write.gains = self.write.gains.clone()
        return copy

    def adopt(self, served: Router) -> None:
        """Take over what `judge` found with a serving copy."""
        self.trust.load_state_dict(served.trust.state_dict())
        self.write.gains.copy_(served.write.gains)


def select(read: Read, visual: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Which `keep` tokens stay, [batch, keep], and what each stands for, [batch, tokens, keep]: farthest-first by distance times
    the attention that is foreseen."""
    distance = euclidean(visual)
    kept = farthest_first(distance, keep, STRENGTH * read.looks)
    return kept, members(distance, kept)


def _normal(x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x.to(dtype), x.shape[-1:])


def waves(places: Tensor, width: int) -> Tensor:
    """Sines and cosines of `places` [n] (Vaswani et al. 2017, arXiv 1706.03762): float32 [n, width]."""
    rate = PERIOD ** -(torch.arange(width // 2) / (width // 2))
    angles = places[:, None] * rate
    return torch.cat([angles.sin(), angles.cos()], -1)


def grid(tokens: int, width: int) -> Tensor:
    """Places of a picture's tokens: row and column where they fill a square, their number otherwise. float32 [tokens, width]."""
    at = torch.arange(tokens)
    side = round(tokens**0.5)
    if side * side != tokens:
        return waves(at, width)
    return torch.cat([waves(at // side, width // 2), waves(at % side, width // 2)], -1)


class RouterFailed(ArithmeticError):
    """Scores that are not finite: nothing can be chosen by them."""


@dataclass(frozen=True)
class Reading:
    """What a router made of one request: all that a route at any level needs. `visual` [images, tokens, width], projected."""

    router: Router
    visual: Tensor
    read: Read

    @torch.inference_mode()
    def keep(self, image: int, keep: int) -> Kept:
        """The tokens of one image that stay, with what was written into them."""
        here = slice(image, image + 1)
        one = Read(self.read.visual[here], self.read.words[here], None, self.read.looks[here], self.read.costs[here])
        visual = self.visual[here]
        if keep >= visual.shape[1]:
            return Kept(torch.arange(visual.shape[1], device=visual.device), visual[0])
        kept, shares = select(one, visual, keep)
        values = self.router.write(one, visual, kept, shares)
        if not torch.isfinite(values).all():
            raise RouterFailed("what the router wrote is not finite")
        return replaced(visual[0], kept[0], shares[0], values[0])

    @property
    def costs(self) -> list[float]:
        """Foreseen cost of each layer that visual rows pass by, mean over the images: logarithms."""
        found: list[float] = self.read.costs.mean(0).tolist()
        return found

    @cached_property
    def chances(self) -> list[float]:
        """Chance that the answer stays what it is on each rung, by the picture that is hardest; 1 on the last, the whole model."""
        found: list[float] = self.router.trust(self.router.impression(self.read)).sigmoid().amin(0).tolist()
        return [*found, 1.0]

    def flops(self, keep: int) -> int:
        """What reading and writing took, all images."""
        images, tokens, _ = self.visual.shape
        return images * self.router.shape.flops(tokens, self.read.words.shape[1], keep)


@torch.inference_mode()
def read_request(router: Router, model: Llava, images: Sequence[ImageFeatures], words: Sequence[int]) -> Reading:
    """Read a request's pictures and the tokens of its question. Raises RouterFailed."""
    visual = torch.cat([image.tokens for image in images])
    embedded = model.embed(torch.tensor(words, dtype=torch.long, device=model.device))
    read = router(visual, embedded.expand(len(images), -1, -1))
    if not (torch.isfinite(read.looks).all() and torch.isfinite(read.costs).all()):
        raise RouterFailed("the router's scores are not finite")
    return Reading(router, visual, read)
