"""A route: what of the model one request runs. Made by `pruning.dynamic`, obeyed by `models.forward`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Route:
    """For one request, which visual tokens are kept from `drop_layer` on and which layers run. Never changes once made.

    `kept_tokens` are ascending indices among the prompt's `visual_tokens`, all images in order. A dropped token is a row that is
    not there from `drop_layer` on. A layer that does not run holds no keys and values, so decoding skips it too. In a layer of
    `frozen_layers` text rows run and attend to the visual rows, which stay as they are (ShortV, arXiv 2504.00502). `token_sizes`
    says how many tokens each kept one stands for, itself included: its attention scores gain the logarithm (ToMe's proportional
    attention, arXiv 2210.09461).
    """

    visual_tokens: int
    kept_tokens: tuple[int, ...]
    layers: tuple[bool, ...]
    drop_layer: int = 0
    frozen_layers: frozenset[int] = frozenset()
    token_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not any(self.layers):
            raise ValueError("a route must run at least one layer")
        if not 0 <= self.drop_layer <= len(self.layers):
            raise ValueError(f"drop_layer {self.drop_layer} is outside 0..{len(self.layers)}")
        if any(a >= b for a, b in zip(self.kept_tokens, self.kept_tokens[1:], strict=False)):
            raise ValueError("kept visual tokens must be ascending and unique")
        if self.kept_tokens and not 0 <= self.kept_tokens[0] <= self.kept_tokens[-1] < self.visual_tokens:
            raise ValueError(f"kept visual tokens must lie in 0..{self.visual_tokens - 1}")
        if not all(0 <= layer < len(self.layers) and self.layers[layer] for layer in self.frozen_layers):
            raise ValueError("visual rows can only stay as they are in layers that run")
        sizes = self.token_sizes
        if sizes and (self.drop_layer or len(sizes) != len(self.kept_tokens) or sum(sizes) != self.visual_tokens):
            raise ValueError("sizes are given to every kept token, add up to all of them, and hold from layer 0 on")

    @classmethod
    def full(cls, visual_tokens: int, layers: int) -> Route:
        return cls(visual_tokens, tuple(range(visual_tokens)), (True,) * layers)

    @cached_property
    def dropped(self) -> int:
        return self.visual_tokens - len(self.kept_tokens)

    def rows(self, prompt: int) -> list[int]:
        """Rows of a prompt of `prompt` tokens in each layer; zero where the layer does not run."""
        return [
            (prompt - (self.dropped if layer >= self.drop_layer else 0)) if runs else 0
            for layer, runs in enumerate(self.layers)
        ]
