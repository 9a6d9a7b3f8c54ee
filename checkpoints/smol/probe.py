"""How well the model answers while it is trained: greedy answers, judged as the questions say. `python -m checkpoints.smol.probe`.

All questions of a picture are answered together, one more token a pass: they share the picture's rows.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from transformers import PreTrainedTokenizerBase

from checkpoints import things
from checkpoints.smol.data import END, START, VISUAL, Scenes, keep, stack_maps
from checkpoints.smol.model import Smol
from checkpoints.smol.train import load
from models.vision.efficientnet import Maps

LONGEST = 10
"""Tokens of an answer. What needs more (a description) is cut, and wrong."""


@torch.inference_mode()
def answers(
    model: Smol, tokenizer: PreTrainedTokenizerBase, maps: Maps, asked: list[str], kept: torch.Tensor
) -> list[str]:
    """Greedy answers to questions about one picture, with the visual tokens `kept`."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    head = encode(f"{START}user\n")
    visual = model.visual(model.look(stack_maps([maps])), kept[None])
    prompts = [encode(text) + encode(f"{END}\n{START}assistant\n") for text in asked]
    made: list[list[int]] = [[] for _ in asked]
    end = tokenizer.eos_token_id
    for _ in range(LONGEST):
        open_ = [i for i, tokens in enumerate(made) if not tokens or tokens[-1] != end]
        if not open_:
            break
        ids, positions = [*head, *[0] * len(kept)], [*range(len(head)), *(kept + len(head)).tolist()]
        segments, last = [0] * len(ids), []
        for i in open_:
            row = prompts[i] + made[i]
            positions += range(len(head) + VISUAL, len(head) + VISUAL + len(row))
            segments += [i + 1] * len(row)
            ids += row
            last.append(len(ids) - 1)
        one = [torch.tensor(values)[None] for values in (ids, positions, segments)]
        hidden = model(*one, visual, len(head))[0, last]
        for i, token in zip(open_, model.logits(hidden).argmax(-1).tolist(), strict=True):
            made[i].append(token)
    return [tokenizer.decode([t for t in tokens if t != end]).strip() for tokens in made]


def main(
    work: Annotated[Path, typer.Option(help="Where features and the state lie.")] = Path("runs/smol"),
    split: Annotated[str, typer.Option(help="known, validation or test, or one of them with -held_out.")] = "validation",
    scenes: Annotated[int, typer.Option(help="How many scenes.")] = 24,
    first: Annotated[int, typer.Option(help="The first of them.")] = 0,
    family: Annotated[str, typer.Option(help="Of one family only.")] = "",
    only: Annotated[str, typer.Option(help="Questions of one type only.")] = "",
    kept: Annotated[int, typer.Option(help="Visual tokens that stay; all of them unless fewer.")] = VISUAL,
    show: Annotated[int, typer.Option(help="Answers to print.")] = 12,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    model, tokenizer, state = load(work)
    found = Scenes(work / "scenes" / split)
    found.refresh()
    right: dict[str, list[bool]] = defaultdict(list)
    by_family: dict[str, list[bool]] = defaultdict(list)
    number = 0
    for maps, record in found:
        if family and record["family"] != family:
            continue
        number += 1
        if number <= first:
            continue
        if number > first + scenes:
            break
        questions = [things.Question(q[0], q[1], q[2], tuple(q[3]), tuple(tuple(p) for p in q[4])) for q in record["questions"]]
        questions = [q for q in questions if not only or q.type.removesuffix("_sentence") == only]
        places = torch.from_numpy(keep(record, kept, Random(number)))
        given = answers(model, tokenizer, maps, [q.text for q in questions], places)
        for question, answer in zip(questions, given, strict=True):
            hit = things.matches(answer, question)
            right[question.type.removesuffix("_sentence")].append(hit)
            by_family[record["family"]].append(hit)
            if show > 0:
                show -= 1
                typer.echo(f"  {'+' if hit else '-'} {question.text} | {answer} | {question.answer}")
    every = [hit for hits in right.values() for hit in hits]
    typer.echo(f"{split} ({state}): {sum(every)}/{len(every)} = {sum(every) / max(1, len(every)):.3f} with {kept} tokens")
    for name, hits in [*sorted(by_family.items()), *sorted(right.items())]:
        typer.echo(f"  {name} {sum(hits)}/{len(hits)} = {sum(hits) / len(hits):.2f}")


if __name__ == "__main__":
    typer.run(main)
