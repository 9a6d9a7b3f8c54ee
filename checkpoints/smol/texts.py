"""SmolLM2's own continuations of short prompts and what it foresaw at every token, so that text-only talk stays as it was:
`python -m checkpoints.smol.texts --work runs/smol`."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from checkpoints.smol.build import build_config
from checkpoints.smol.parts import LANGUAGE, fetch, language_tokenizer, language_weights

TOP = 48
TOGETHER = 48
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
def main(
    work: Annotated[Path, typer.Option(help="Goes to its texts.pt.")] = Path("runs/smol"),
    count: Annotated[int, typer.Option(help="How many texts.")] = 96,
    length: Annotated[int, typer.Option(help="Tokens that are sampled for each.")] = 72,
    seed: Annotated[int, typer.Option(help="Prompts and samples.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
) -> None:
    if (work / "texts.pt").exists():
        typer.echo(f"{work / 'texts.pt'} is there; remove it to make it again")
        return
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    gguf = fetch(LANGUAGE, work / "parts")
    tokenizer = language_tokenizer(gguf)
    model = LlamaForCausalLM(build_config().text_config)
    model.load_state_dict(language_weights(gguf), strict=False)  # the head is the embedding
    model.tie_weights()
    texts = []
    starts = prompts(tokenizer, count, Random(seed))
    for first in range(0, count, TOGETHER):
        batch = tokenizer.pad({"input_ids": starts[first : first + TOGETHER]}, return_tensors="pt")
        made = model.generate(**batch, max_new_tokens=length, do_sample=True, temperature=1.0, top_k=0)
        for row, mask in zip(made, batch["attention_mask"], strict=True):
            asked = int(mask.sum())
            ids = row[len(mask) - asked :]
            ended = (ids[asked:] == tokenizer.eos_token_id).nonzero()[:, 0]
            ids = ids[: asked + int(ended[0]) + 1] if len(ended) else ids
            top = model(ids[None]).logits[0].float().softmax(-1).topk(TOP)
            texts.append({"ids": ids.int(), "top": top.indices.int(), "share": top.values.half()})
    torch.save(texts, work / "texts.pt")


if __name__ == "__main__":
    typer.run(main)
