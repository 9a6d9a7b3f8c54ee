"""Tiny random models, prompts and pictures, and a request that is driven by hand."""

from __future__ import annotations

import torch

from models.forward import decode_input, forward, prefill_input
from models.llava import Llava, from_transformers
from models.random_llava import random_model, tiny_config
from models.route import Route

IMAGE, VISUAL = 127, 16


def pair(kind: str = "llama", **options: object):
    """The same random weights twice: transformers' model, and ours."""
    config = tiny_config(kind, **options)
    return random_model(config, seed=1), from_transformers(random_model(config, seed=1))


def prompt(images: int, text: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 120, (text,), generator=generator).tolist()
    return [1, *([*[IMAGE] * VISUAL, 5] * images), *words]


def pixels(images: int, seed: int) -> torch.Tensor | None:
    return torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) if images else None


class Session:
    """One request driven by hand through the model."""

    def __init__(self, model: Llava, ids: list[int], images: torch.Tensor | None, route: Route | None = None) -> None:
        visual = None if images is None else model.vision(images).tokens.flatten(0, 1)
        count = 0 if visual is None else len(visual)
        self.model, self.ids = model, list(ids)
        self.route = route or Route.full(count, model.num_layers)
        self.cache = model.new_cache(self.route.rows(len(ids), 32))
        self.input = prefill_input(model, torch.tensor(ids, device=model.device), visual, self.route, self.cache)

    def push(self, token: int) -> None:
        ids = torch.tensor([token], device=self.model.device)
        self.input = decode_input(self.model, ids, len(self.ids), self.route, self.cache)
        self.ids.append(token)


def greedy(sessions: list[Session], steps: int) -> list[list[int]]:
    made: list[list[int]] = [[] for _ in sessions]
    for _ in range(steps):
        logits = forward(sessions[0].model, [s.input for s in sessions])
        for session, out, token in zip(sessions, made, logits.argmax(-1).tolist(), strict=True):
            out.append(token)
            session.push(token)
    return made
