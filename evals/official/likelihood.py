"""How likely a model finds given answers: what pruning changes shows here before the words change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp

import torch
from rich.console import Console
from rich.progress import track

from evals.official.ask import decode_picture
from evals.official.task import Question
from models.forward import forward, prefill_input
from server.engine import Engine

LogLikelihood = Callable[[Question, str], tuple[float, int]]
"""The summed log-probability of an answer's tokens, its end aside, and how many they are; none where nothing was said."""


def through_engine(engine: Engine, level: str) -> LogLikelihood:
    """On the route that the level gives the question, from what its vision tower sees."""
    model, preprocessor, patch_ratio = engine.model, engine.preprocessor, engine.menu[level].patch_ratio

    def measure(question: Question, text: str) -> tuple[float, int]:
        pictures = [] if question.image is None else [preprocessor.picture(decode_picture(question))]
        layouts = [picture.layout for picture in pictures]
        prompt, answer, _ = preprocessor.answered(question.text, text, layouts, len(layouts))
        if not answer or len(prompt) + len(answer) > engine.context_length:
            return 0.0, 0
        features = [model.encode(picture.pixels, picture.layout, patch_ratio) for picture in pictures]
        plan = engine.planner.plan(level, "default", prompt, features)
        tokens = torch.tensor(prompt + answer, device=model.device)
        cache = model.new_cache(plan.route.rows(len(tokens) - 1, 0))
        last = prefill_input(model, tokens[:-1], plan.visual, plan.route, cache, logits_to_keep=len(answer))
        found = forward(model, [last]).log_softmax(-1).gather(1, tokens[len(prompt) :, None])
        return float(found.sum()), len(answer)

    return measure


def perplexity(likelihood: LogLikelihood, questions: Sequence[Question], texts: Sequence[str], console: Console) -> float:
    """Of all tokens of the texts, as answers to the questions."""
    pairs = track([*zip(questions, texts, strict=True)], "perplexity of the dense answers", console=console)
    found = [likelihood(question, text) for question, text in pairs]
    return exp(-sum(one for one, _ in found) / max(1, sum(count for _, count in found)))
