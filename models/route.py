"""A route: what of the model one request runs. Made by `pruning.dynamic`, followed by `models.forward`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise


@dataclass(frozen=True)
class Route:
    """For one request, which visual tokens are kept and which layers run. Never changes once made.

    `kept_tokens` are ascending indices among the prompt's `visual_tokens`, all images in order. A dropped token has no row. A layer
    that does not run holds no keys and values, so decoding skips it too. In a layer of `frozen_layers` text rows run and attend to
    the visual rows, which stay as they are (ShortV, arXiv 2504.00502). `token_sizes` says how many tokens each kept one stands for,
    itself included: its attention scores gain the logarithm (ToMe's proportional attention, arXiv 2210.09461).
    """

    visual_tokens: int
    kept_tokens: tuple[int, ...]
    layers: tuple[bool, ...]
    frozen_layers: frozenset[int] = frozenset()
    token_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        kept, sizes = self.kept_tokens, self.token_sizes
        if not any(self.layers):
            raise ValueError("a route must run at least one layer")
        if any(a >= b for a, b in pairwise(kept)):
            raise ValueError("kept visual tokens must be ascending and unique")
        if kept and not 0 <= kept[0] <= kept[-1] < self.visual_tokens:
            raise ValueError(f"kept visual tokens must lie in 0..{self.visual_tokens - 1}")
        if not all(0 <= layer < len(self.layers) and self.layers[layer] for layer in self.frozen_layers):
            raise ValueError("visual rows can only be frozen in layers that run")
        if sizes and (len(sizes) != len(kept) or sum(sizes) > self.visual_tokens):
            raise ValueError("token sizes are given to every kept token and add up to no more than all of them")

    @classmethod
    def full(cls, visual_tokens: int, layers: int) -> Route:
        return cls(visual_tokens, tuple(range(visual_tokens)), (True,) * layers)

    @property
    def dropped(self) -> int:
        return self.visual_tokens - len(self.kept_tokens)

    @cached_property
    def last_layer(self) -> int:
        """The last one that runs."""
        return max(layer for layer, runs in enumerate(self.layers) if runs)

    def rows(self, prompt: int, answer: int = 0) -> list[int]:
        """Rows in each layer of a prompt of `prompt` tokens and `answer` more; zero where the layer does not run."""
        return [prompt - self.dropped + answer if runs else 0 for runs in self.layers]
