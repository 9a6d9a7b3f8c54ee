"""What pruning or rounding cost a checkpoint: its answers beside the dense model's, about pictures that calibration did not see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path
from random import Random

import torch
from rich.console import Console
from rich.progress import track

from models.checkpoint import Checkpoint, load
from models.manifest import HeldOut, read_manifest, write_manifest
from models.route import Route
from models.run_state import RunState
from pruning.answers import Prompt, generate, log_probabilities
from pruning.samples import Sample

PICTURES = 64
"""Each with one of its questions."""
BATCH = 8
MOST_TOKENS = 64
"""Of an answer."""

Answers = list[list[int]]


def measure(
    dense: Path, run_state: RunState, samples: Sequence[Sample], seed: int, device: str, dtype: str, console: Console
) -> None:
    """Write what pruning cost into the draft's manifest."""
    found = cost(dense, run_state, samples, seed, device, dtype, console)
    manifest = read_manifest(run_state.draft)
    assert manifest.pruning
    pruning = manifest.pruning.model_copy(update={"held_out": found})
    write_manifest(run_state.draft, manifest.model_copy(update={"pruning": pruning}))


def cost(
    dense: Path, run_state: RunState, samples: Sequence[Sample], seed: int, device: str, dtype: str, console: Console
) -> HeldOut | None:
    """Ask the dense checkpoint and the draft about `samples`, one of the models in memory at a time. None where there are none.

    One pass over the dense model's greedy answers is enough: the changed model gives the same one if and only if each of its tokens
    is the likeliest.
    """
    if not samples:
        console.print("what it cost is not measured: calibration takes all pictures of the data; give some more")
        return None
    asked = run_state.read("dense-answers")
    if asked is None:
        source = load(dense, device, dtype)
        answers = _answers(source, samples, seed, console)
        asked = {"answers": answers, "likelihood": _compare(source, samples, answers, seed, console)[1]}
        run_state.write("dense-answers", asked)
        del source
    same, likelihood = _compare(load(run_state.draft, device, dtype), samples, asked["answers"], seed, console)
    tokens = sum(len(answer) for answer in asked["answers"])
    return HeldOut(
        questions=len(samples), agreement=round(same / len(samples), 4), perplexity=round(exp(-likelihood / tokens), 4),
        dense_perplexity=round(exp(-asked["likelihood"] / tokens), 4),
    )  # fmt: skip


@torch.inference_mode()
def _answers(source: Checkpoint, samples: Sequence[Sample], seed: int, console: Console) -> Answers:
    answers: Answers = []
    for batch in _batches(source, samples, seed, console, "held-out answers, dense"):
        answers += generate(source.model, batch, source.eos, MOST_TOKENS)
    return answers


def _compare(
    checkpoint: Checkpoint, samples: Sequence[Sample], answers: Answers, seed: int, console: Console
) -> tuple[int, float]:
    """How many of these answers are a checkpoint's greedy ones, and the summed log-probability of all their tokens."""
    model, same, likelihood = checkpoint.model, 0, 0.0
    for batch in _batches(checkpoint, samples, seed, console, "held-out answers"):
        given, answers = answers[: len(batch)], answers[len(batch) :]
        routes = [Route.full(len(prompt.visual), model.num_layers) for prompt in batch]
        for log_probs, answer in zip(log_probabilities(model, batch, given, routes), given, strict=True):
            tokens = torch.tensor(answer, device=log_probs.device)
            same += bool((log_probs.argmax(-1) == tokens).all())
            likelihood += float(log_probs.gather(1, tokens[:, None]).double().sum())
    return same, likelihood


@torch.inference_mode()
def _batches(
    checkpoint: Checkpoint, samples: Sequence[Sample], seed: int, console: Console, what: str
) -> Iterator[list[Prompt]]:
    """The samples' pictures, each with one of its questions."""
    preprocessor = checkpoint.preprocessor
    for first in track(range(0, len(samples), BATCH), what, console=console, transient=True):
        batch = []
        for number, sample in enumerate(samples[first : first + BATCH], first):
            question, _ = Random(f"{seed}/held out/{number}").choice(sample.turns)
            picture = preprocessor.picture(sample.image)
            visual = checkpoint.model.encode(picture.pixels, picture.layout).tokens[0]
            batch.append(Prompt(preprocessor.question(question, layout=picture.layout), visual))
        yield batch
