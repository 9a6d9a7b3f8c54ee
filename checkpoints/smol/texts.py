"""SmolLM2's own continuations of short prompts, so that text-only talk can be kept as it was."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from checkpoints.smol.build import build_config

TOGETHER = 512
TOPICS = (
    "the sea", "a long train journey", "bread", "how engines work", "the moon", "a small village", "money", "music",
    "the human heart", "rain", "computers", "a court case", "chess", "the history of Rome", "gardening", "a lost dog",
    "mathematics", "winter", "an old house", "football", "elections", "medicine", "the desert", "a recipe", "teachers",
    "friendship", "iron", "birds", "the internet", "a job interview", "Paris", "sleep",
)  # fmt: skip
FORMS = ("Tell me about {}.", "Write a short story about {}.", "Why do people care about {}?", "Give me three facts about {}.")
STARTS = (
    "The", "In", "It was", "She", "After the", "According to", "When", "There are", "He said that", "For example,",
    "Chapter 1\n", "A study of",
)  # fmt: skip
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def prompts(tokenizer: PreTrainedTokenizerFast, count: int, rng: Random) -> list[list[int]]:
    """Half chats, half the beginnings of plain texts."""
    found = []
    for number in range(count):
        if number % 2:
            text = rng.choice(STARTS)
        else:
            said = rng.choice(FORMS).format(rng.choice(TOPICS))
            text = f"{SYSTEM if rng.random() < 0.5 else ''}<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
        found.append(list(tokenizer(text, add_special_tokens=False).input_ids))
    return found


@torch.no_grad()
def sample(
    weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast, count: int, length: int, seed: int
) -> list[list[int]]:
    """`count` texts of a prompt and up to `length` sampled tokens, on the device that the weights are on."""
    norm = weights["model.norm.weight"]
    torch.manual_seed(seed)
    model = LlamaForCausalLM(build_config().text_config).to(norm.device, norm.dtype)
    model.load_state_dict(dict(weights), strict=False)  # the head is the embedding
    model.tie_weights()
    texts: list[list[int]] = []
    starts = prompts(tokenizer, count, Random(seed))
    for first in range(0, count, TOGETHER):
        batch = tokenizer.pad({"input_ids": starts[first : first + TOGETHER]}, return_tensors="pt").to(norm.device)
        made = model.generate(**batch, max_new_tokens=length, do_sample=True, temperature=1.0, top_k=0)
        for row, mask in zip(made.tolist(), batch["attention_mask"].tolist(), strict=True):
            start = len(mask) - sum(mask)
            sampled = row[len(mask) :]
            if tokenizer.eos_token_id in sampled:
                sampled = sampled[: sampled.index(tokenizer.eos_token_id) + 1]
            texts.append(row[start : len(mask)] + sampled)
    return texts
