"""From logits to a token: penalties and bias, temperature, top-k, top-p, min-p; each a pure function over one row."""

from __future__ import annotations

from collections.abc import Collection, Sequence

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
    """Whether the token is simply the model's largest logit."""
    touched = sampling.frequency_penalty or sampling.presence_penalty or sampling.logit_bias or sampling.min_tokens
    return sampling.temperature == 0 and not touched and sampling.repetition_penalty == 1


def penalize(logits: Tensor, made: Sequence[int], sampling: Sampling, prompt: Sequence[int] = ()) -> Tensor:
    """Penalties on tokens seen. OpenAI's on those made: presence once, frequency per time. The repetition penalty (CTRL,
    arXiv 1909.05858, as transformers and vLLM apply it) divides positive and multiplies negative logits of the prompt's and
    the made tokens. `logits` [vocab] are copied."""
    logits = logits.clone()
    if sampling.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *made}), dtype=torch.long, device=logits.device)
        logits[seen] *= torch.where(logits[seen] > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
    if made:
        tokens, counts = torch.tensor(made, device=logits.device).unique(return_counts=True)  # type: ignore[no-untyped-call]
        logits[tokens] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return logits


def sample(
    logits: Tensor, made: Sequence[int], sampling: Sampling, generator: torch.Generator,
    prompt: Sequence[int] = (), ends: Collection[int] = (), allowed: Tensor | None = None,
) -> int:  # fmt: skip
    """Draw one token from float32 `logits` [vocab] given the tokens `made` so far; none of `ends` before `min_tokens`, and none
    that is not `allowed`, bool [vocab]."""
    logits = penalize(logits, made, sampling, prompt)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    if len(made) < sampling.min_tokens:
        logits[list(ends)] = -torch.inf
    if allowed is not None:
        logits[~allowed.to(logits.device)] = -torch.inf
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The largest logit is made zero first: divided by next to nothing, it would overflow.
    scaled = (logits - logits.max()).cpu() / max(sampling.temperature, 1e-6)
    probabilities = truncate(scaled.softmax(-1), sampling.top_k, sampling.top_p, sampling.min_p)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def truncate(probabilities: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Keep the `top_k` most likely tokens (0 or -1: all), the fewest whose mass reaches `top_p`, and of these the ones of at
    least `min_p` of the likeliest one's probability; always at least one."""
    if top_k <= 0 and top_p == 1 and min_p == 0:
        return probabilities
    ordered, tokens = probabilities.sort(descending=True)
    keep = (ordered.cumsum(-1) - ordered < top_p) & (ordered >= min_p * ordered[0])
    keep[0] = True
    if top_k > 0:
        keep[top_k:] = False
    return torch.zeros_like(probabilities).scatter(0, tokens[keep], ordered[keep])


def top_logprobs(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of `token` under the model (before temperature and penalties), and of the `count` likeliest."""
    logprobs = logits.log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    return float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
