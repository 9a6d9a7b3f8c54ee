"""From logits to a token: penalties, temperature, top-k, top-p; each a pure function over one row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.request import Sampling


def new_generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % (1 << 63))
    return generator


def is_greedy(sampling: Sampling) -> bool:
    """Whether the token is simply the largest logit, so that a whole batch can be answered by one argmax."""
    return sampling.temperature == 0 and not sampling.frequency_penalty and not sampling.presence_penalty


def penalize(logits: Tensor, made: Sequence[int], sampling: Sampling) -> Tensor:
    """OpenAI's penalties on tokens already made: presence once, frequency per time. `logits` [vocab]."""
    if not made or not (sampling.frequency_penalty or sampling.presence_penalty):
        return logits
    tokens, counts = torch.tensor(made, device=logits.device).unique(return_counts=True)  # type: ignore[no-untyped-call]
    logits = logits.clone()
    logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return logits


def sample(logits: Tensor, made: Sequence[int], sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token from float32 `logits` [vocab] given the tokens `made` so far."""
    logits = penalize(logits, made, sampling)
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The largest logit is made zero first: divided by next to nothing, it would overflow.
    scaled = (logits - logits.max()).cpu() / max(sampling.temperature, 1e-6)
    probabilities = truncate(scaled.softmax(-1), sampling.top_k, sampling.top_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def truncate(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Keep the `top_k` most likely tokens (0: all) and the fewest whose mass reaches `top_p`; always at least one."""
    if top_k == 0 and top_p == 1:
        return probabilities
    ordered, tokens = probabilities.sort(descending=True)
    keep = ordered.cumsum(-1) - ordered < top_p
    keep[0] = True
    if top_k:
        keep[top_k:] = False
    return torch.zeros_like(probabilities).scatter(0, tokens[keep], ordered[keep])


def top_logprobs(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of `token` under the model (before temperature and penalties), and of the `count` likeliest."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
