"""The meta-router: it reads a request's pictures and question once, and serves any budget.

It predicts three things. How much attention the model will pay to each visual token. What it would cost to freeze the visual
tokens in a layer. And at which operating points, from few tokens and layers to many, the answer will stay what it is. It also
corrects merged tokens: it adds to those that stay what those that go had to say.

After PAR's meta-router (Pruning All-Rounder, arXiv 2412.06458, figure 3: visual tokens, question and one learnable token a layer
in, one score each out), with four changes of ours. Attention is bidirectional, so that a visual token's score depends on the
question. The rows are narrow, so that all of it costs under 3 % of a dense prefill. A score is a quantity that can be checked: the
logarithm of the attention that the un-pruned model will pay, or of the divergence that it would suffer (`training/teacher.py`).
And tokens are not dropped: they are merged, and the merged ones are corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.llava import Llava
from models.vision.features import ImageFeatures
from pruning.dynamic.token_merging import KeptTokens, choose_tokens, means, replaced

MAX_PERIOD = 100.0
"""Longest wave of the position encoding, in patches or text tokens."""
SCORE_WEIGHT = 0.3
"""Weight of the scores beside the logarithm of the distance: 0.15 and 0.6 keep less (validation, docs/log.md)."""
CORRECTION = {1 / 18: 1.0, 1 / 9: 1.0, 1 / 4: 0.5, 1 / 2: 0.0}
"""Share of the tokens that stay: share of the correction that is added. The more tokens stay, the less there is to put right. Both
shipped routers kept most held-out answers with these (docs/log.md)."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.85, 0.9, 0.95, 0.98, 0.99, 1.0)
"""Of a picture's token scores, which the agreement head reads."""
MAX_TEXT = 64
"""Most text tokens that a router reads: the end of the prompt, where the question is."""


def text_window(prompt: Sequence[int], image_token: int) -> list[int]:
    """What of a prompt the router reads: its last text tokens, but none from before the first picture."""
    start = prompt.index(image_token) if image_token in prompt else 0
    return [token for token in prompt[start:] if token != image_token][-MAX_TEXT:]


@dataclass(frozen=True)
class RouterConfig:
    """The language model's width and layers; the router's own `width`, `depth` in layers, and `heads`.

    `operating_points`: how many it predicts the agreement of, the whole model aside, by a head of `agreement_width`.
    """

    model_width: int
    model_layers: int
    width: int
    depth: int = 2
    heads: int = 4
    operating_points: int = 17
    agreement_width: int = 64

    def flops(self, visual: int, text: int, kept: int) -> int:
        """Multiply-adds times two for a picture of `visual` tokens, of which `kept` stay, and a question of `text` tokens. Where
        all stay, nothing is corrected."""
        rows = visual + text + self.model_layers
        scoring = self.model_width * (visual + text) + self.depth * self._layer(rows, rows)
        if kept >= visual:
            return 2 * self.width * scoring
        correcting = self.model_width * (visual + kept) + self.width * (visual + kept)
        correcting += self.depth * self._layer(kept + text, kept + text + visual)
        return 2 * self.width * (scoring + correcting)

    def _layer(self, rows: int, seen: int) -> int:
        return rows * 10 * self.width + seen * 2 * self.width + 2 * rows * seen


def default_width(model_width: int) -> int:
    """The router's width for a model's, in whole heads: an eighth; of a small model up to 64, but no more than a quarter."""
    return max(16, min(model_width // 32 * 8, max(64, model_width // 64 * 8)))


class RouterLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key_value, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None, context: Tensor | None = None) -> Tensor:
        """x [batch, n, width] attends to itself and to `context` [batch, m, width]; `mask` [batch, n + m] is False for padding."""
        seen = self.norm1(x if context is None else torch.cat([x, context], 1))
        query = self.query(seen[:, : x.shape[1]]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=None if mask is None else mask[:, None, None])
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class RouterOutput(NamedTuple):
    """What the router makes of a batch of pictures and questions.

    visual [batch, tokens, width] and text [batch, n, width]: its own last rows; `text_mask` [batch, n], False for padding, or None.
    token_scores [batch, tokens], float32: the logarithm of the attention that each visual token will get. layer_scores [batch,
    model layers], float32: the logarithm of the divergence if visual tokens are frozen in that layer.
    """

    visual: Tensor
    text: Tensor
    text_mask: Tensor | None
    token_scores: Tensor
    layer_scores: Tensor


class MergeCorrector(nn.Module):
    """Corrects merged tokens, so that the model can tell from them what those that went would have said."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        width = config.width
        self.visual_in, self.router_in = nn.Linear(config.model_width, width), nn.Linear(width, width)
        self.own_in, self.size_in = nn.Linear(width, width), nn.Linear(1, width)
        self.layers = nn.ModuleList(RouterLayer(width, config.heads) for _ in range(config.depth))
        self.norm, self.out = nn.RMSNorm(width), nn.Linear(width, config.model_width)
        # It begins by adding nothing: an untrained one leaves the plain means.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, output: RouterOutput, visual: Tensor, kept: Tensor, shares: Tensor) -> Tensor:
        """The kept tokens' new values, float32 [batch, keep, model width]: the mean of what each stands for, and a correction.

        kept [batch, keep], ascending; shares [batch, tokens, keep], see `token_merging.members`.
        """
        keep, dtype = kept.shape[1], self.visual_in.weight.dtype
        tokens = self.visual_in(_normalized(visual, dtype)) + self.router_in(output.visual)
        own = self.own_in(tokens.take_along_dim(kept[..., None], 1))
        merged = means(tokens, shares).to(dtype) + own + self.size_in(shares.sum(1).log()[..., None].to(dtype))
        x = torch.cat([merged, output.text], 1)
        mask = output.text_mask
        if mask is not None:
            mask = F.pad(F.pad(mask, (keep, 0), value=True), (0, tokens.shape[1]), value=True)
        for layer in self.layers:
            x = layer(x, mask, tokens)
        scale = visual.float().square().mean((-2, -1), keepdim=True).sqrt()
        added = float(np.interp(keep / visual.shape[1], list(CORRECTION), list(CORRECTION.values())))
        out: Tensor = means(visual, shares) + added * scale * self.out(self.norm(x[:, :keep])).float()
        return out


class AgreementHead(nn.Module):
    """How likely an answer stays at each operating point."""

    def __init__(self, features: int, width: int, points: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(features, width), nn.Linear(width, points)

    def forward(self, features: Tensor, dropout: float = 0.0) -> Tensor:
        """Logits [n, points] of pooled features [n, features]."""
        logits: Tensor = self.out(F.dropout(F.gelu(self.hidden(features)), dropout))
        return logits


class Router(nn.Module):
    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.visual_in, self.text_in = nn.Linear(config.model_width, width), nn.Linear(config.model_width, width)
        self.layer_tokens = nn.Parameter(0.02 * torch.randn(config.model_layers, width))
        self.layers = nn.ModuleList(RouterLayer(width, config.heads) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width)
        self.token_head, self.layer_head = nn.Linear(width, 1), nn.Linear(width, 1)
        self.corrector = MergeCorrector(config)
        features = 4 * width + config.model_layers + len(QUANTILES)
        self.agreement = AgreementHead(features, config.agreement_width, config.operating_points)

    def forward(self, visual: Tensor, text: Tensor, text_mask: Tensor | None = None) -> RouterOutput:
        """Score pictures, each with a question.

        visual [batch, tokens, model width], projected; text [batch, n, model width], the question's embeddings; `text_mask`
        [batch, n] is False for padding.
        """
        (batch, tokens, _), n, width = visual.shape, text.shape[1], self.config.width
        dtype = self.visual_in.weight.dtype
        seen = self.visual_in(_normalized(visual, dtype)) + grid_positions(tokens, width).to(visual.device, dtype)
        read = self.text_in(_normalized(text, dtype)) + sinusoids(torch.arange(n), width).to(visual.device, dtype)
        x = torch.cat([seen, read, self.layer_tokens.expand(batch, -1, -1)], 1)
        mask = text_mask
        if mask is not None:
            mask = F.pad(F.pad(mask, (tokens, 0), value=True), (0, self.config.model_layers), value=True)
        for layer in self.layers:
            x = layer(x, mask)
        seen, read, layers = self.norm(x).split([tokens, n, self.config.model_layers], 1)
        token_scores, layer_scores = self.token_head(seen)[..., 0].float(), self.layer_head(layers)[..., 0].float()
        return RouterOutput(seen, read, text_mask, token_scores, layer_scores)

    def pooled_features(self, output: RouterOutput) -> Tensor:
        """What the agreement head reads, float32 [batch, features]: the mean and the largest values of text and of visual rows, the
        layer scores, and how the token scores spread."""
        text, visual, scores = output.text.float(), output.visual.float(), output.token_scores
        present = torch.ones_like(text[..., 0]) if output.text_mask is None else output.text_mask.float()
        text = text * present[..., None]
        mean = text.sum(1) / present.sum(1, keepdim=True).clamp_min(1)
        largest = F.pad(text, (0, 0, 0, 1)).amax(1)  # of none it is zero
        spread = scores.quantile(scores.new_tensor(QUANTILES), dim=1).T
        return torch.cat([mean, largest, visual.mean(1), visual.amax(1), output.layer_scores, spread], -1)

    def serving(self, dtype: torch.dtype) -> Router:
        """A copy as it serves, in `dtype`. The agreement head stays in float32: thresholds are fine."""
        copy = deepcopy(self).requires_grad_(False).eval().to(dtype)
        copy.agreement.float()
        return copy


def select_tokens(output: RouterOutput, visual: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Which `keep` tokens stay, [batch, keep], and what each stands for, [batch, tokens, keep]: farthest-first by distance times
    the predicted attention."""
    return choose_tokens(visual, keep, SCORE_WEIGHT * output.token_scores)


def _normalized(x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.rms_norm(x.to(dtype), x.shape[-1:])


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Sines and cosines of `positions` [n] (Vaswani et al. 2017, arXiv 1706.03762): float32 [n, width]."""
    rate = MAX_PERIOD ** -(torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angles = positions[:, None] * rate
    return torch.cat([angles.sin(), angles.cos()], -1)


def grid_positions(tokens: int, width: int) -> Tensor:
    """Encoding of a picture's tokens: of row and column where they fill a square, else of their number. float32 [tokens, width]."""
    at = torch.arange(tokens)
    side = round(tokens**0.5)
    if side * side != tokens:
        return sinusoids(at, width)
    return torch.cat([sinusoids(at // side, width // 2), sinusoids(at % side, width // 2)], -1)


class RouterFailed(ArithmeticError):
    """Scores that are not finite: nothing can be chosen by them."""


@dataclass(frozen=True)
class RequestRouting:
    """What a router makes of one request: all that a route at any level needs. `visual` [images, tokens, width], projected."""

    router: Router
    visual: Tensor
    output: RouterOutput

    @torch.inference_mode()
    def keep_tokens(self, keep: int) -> list[KeptTokens]:
        """The `keep` tokens of each image that stay, merged and corrected. Raises RouterFailed."""
        if keep >= self.visual.shape[1]:
            return [KeptTokens.all(tokens) for tokens in self.visual]
        kept, shares = select_tokens(self.output, self.visual, keep)
        values = self.router.corrector(self.output, self.visual, kept, shares)
        if not torch.isfinite(values).all():
            raise RouterFailed("the corrected tokens are not finite")
        return [replaced(*parts) for parts in zip(self.visual, kept, shares, values, strict=True)]

    @property
    def layer_scores(self) -> list[float]:
        """Predicted cost of freezing visual tokens in each layer, mean over the images: logarithms."""
        scores: list[float] = self.output.layer_scores.mean(0).tolist()
        return scores

    @cached_property
    def expected_agreement(self) -> list[float]:
        """Probability that the answer stays at each operating point, by the picture that is hardest; 1 at the whole model, the
        last."""
        logits = self.router.agreement(self.router.pooled_features(self.output))
        probabilities: list[float] = logits.sigmoid().amin(0).tolist()
        return [*probabilities, 1.0]

    def flops(self, keep: int) -> int:
        """What scoring and correcting take, all images."""
        images, tokens, _ = self.visual.shape
        return images * self.router.config.flops(tokens, self.output.text.shape[1], keep)


@torch.inference_mode()
def score_request(router: Router, model: Llava, images: Sequence[ImageFeatures], text: Sequence[int]) -> RequestRouting:
    """Run the router on a request's pictures and on `text` (see `text_window`). Raises RouterFailed."""
    visual = torch.cat([image.tokens for image in images])
    embedded = model.embed(torch.tensor(text, dtype=torch.long, device=model.device))
    output = router(visual, embedded.expand(len(images), -1, -1))
    if not (torch.isfinite(output.token_scores).all() and torch.isfinite(output.layer_scores).all()):
        raise RouterFailed("the router's scores are not finite")
    return RequestRouting(router, visual, output)
