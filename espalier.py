"""The front door: `espalier serve | prune | route | eval | bench | calibrate | inspect`. A command imports only what it needs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Serve LLaVA checkpoints that prune themselves per request.", no_args_is_help=True, pretty_exceptions_enable=False
)
bench = typer.Typer(help="Measure: the model alone, or a running server.", no_args_is_help=True)
app.add_typer(bench, name="bench")
errors = Console(stderr=True)

CHECKPOINT = Annotated[str, typer.Argument(help="A directory that transformers loads, embedded or embedded-dense.")]
DEVICE = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
TOKEN_POLICY = Annotated[
    str | None,
    typer.Option(help="router (default where there is one), merging, divprune, cls_diversity, random, uniform or pooling."),
]
DTYPE = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]


@app.command()
def serve(
    checkpoint: Annotated[str | None, typer.Argument(help="A directory transformers loads, embedded or embedded-dense.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")] = None,
    default_level: Annotated[str | None, typer.Option(help="Pruning level of requests that name none.")] = None,
    token_policy: TOKEN_POLICY = None,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API. Every option is also an environment variable, ESPALIER_PORT and so on."""
    from server.run import run

    given = {"checkpoint": checkpoint, "host": host, "port": port, "device": device, "dtype": dtype,
             "default_level": default_level, "token_policy": token_policy}  # fmt: skip
    with _plain_errors():
        run({name: value for name, value in given.items() if value is not None})


@app.command("eval")
def evaluate(
    checkpoint: CHECKPOINT = "embedded",
    task: Annotated[str, typer.Option(help="What is asked: scenes (the embedded world).")] = "scenes",
    level: Annotated[str, typer.Option(help="Pruning level.")] = "off",
    limit: Annotated[int, typer.Option(min=1, help="Questions, one per picture.")] = 4000,
    split: Annotated[str, typer.Option(help="test to report, validation to tune.")] = "test",
    token_policy: TOKEN_POLICY = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
    json: Annotated[bool, typer.Option("--json", help="Only the JSON document on the last line.")] = False,
    cards: Annotated[bool, typer.Option("--cards", help="Ask at every level and write what each does into the manifest.")] = False,
) -> None:
    """Ask held-out questions and count exact matches, with 95 % intervals."""
    from evals import cards as every_level
    from evals.scenes import run

    if task != "scenes":
        raise typer.BadParameter(f"task {task!r} is not known; scenes is", param_hint="--task")
    with _plain_errors():
        if cards:
            every_level.run(checkpoint, limit, split, device, dtype, quiet=json)
        else:
            run(checkpoint, level, limit, split, token_policy, device, dtype, quiet=json)


@app.command()
def calibrate(
    checkpoint: CHECKPOINT,
    samples: Annotated[int, typer.Option(min=1, help="Pictures with one question each.")] = 128,
    seed: Annotated[int, typer.Option(help="Which pictures.")] = 0,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
) -> None:
    """Measure how much each layer changes the hidden state and store it in the manifest: levels then know what to skip."""
    from evals.calibration import run

    with _plain_errors():
        run(checkpoint, samples, seed, device, dtype)


@app.command()
def prune(
    checkpoint: CHECKPOINT,
    out: Annotated[Path, typer.Option(help="The directory to make.")],
    recipe: Annotated[Path | None, typer.Option(help="A TOML file of the options below; flags win over it.")] = None,
    criterion: Annotated[str | None, typer.Option(help="magnitude, wanda or obs (default).")] = None,
    pattern: Annotated[str | None, typer.Option(help="unstructured (default), n:m such as 2:4, or structured.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="What goes of the language model's matrices; 0.5 by default.")] = None,
    vision_sparsity: Annotated[float | None, typer.Option(help="The same of the vision tower; 0 by default.")] = None,
    allocation: Annotated[str | None, typer.Option(help="uniform (default), ecoflap, owl or search.")] = None,
    score: Annotated[str | None, typer.Option(help="ecoflap: zo (default), zeroth order, or fo, first order.")] = None,
    maximum: Annotated[float | None, typer.Option(help="ecoflap: most that a block may lose; sparsity + 0.1 by default.")] = None,
    average: Annotated[bool | None, typer.Option(help="ecoflap: divide a block's score by its size.")] = None,
    shared_budget: Annotated[bool | None, typer.Option(help="ecoflap and owl: one budget over both towers.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration samples; 64 by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which samples, and every random choice; 0 by default.")] = None,
    data: Annotated[str | None, typer.Option(help="world (default), or a JSONL file, see docs/pruning.md.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Sample these families of the world alone; may repeat.")] = None,
    visual_weight: Annotated[float | None, typer.Option(help="What a visual row counts beside a text row; 1 by default.")] = None,
    damping: Annotated[float | None, typer.Option(help="obs: share of the mean diagonal added; 0.01 by default.")] = None,
    block_size: Annotated[int | None, typer.Option(help="obs: columns between updates; 128 by default.")] = None,
    uniform_width: Annotated[bool | None, typer.Option(help="structured: the same widths in every layer.")] = None,
    levels: Annotated[int | None, typer.Option(help="search: levels on either side of the target; 4 by default.")] = None,
    generations: Annotated[int | None, typer.Option(help="search: generations in all; 40 by default.")] = None,
    offspring: Annotated[int | None, typer.Option(help="search: policies tried in a generation; 16 by default.")] = None,
    eta: Annotated[float | None, typer.Option(help="search: weight of structural risk, for obs; 0.3 by default.")] = None,
    projector: Annotated[bool | None, typer.Option(help="search: tune the projector in turns with it, as is the default.")] = None,
    rounds: Annotated[int | None, typer.Option(help="search: turns of search and projector; 2 by default.")] = None,
    reconstruct: Annotated[int | None, typer.Option(help="Steps of block-wise reconstruction; none by default.")] = None,
    ray: Annotated[str | None, typer.Option(help="search: spread evaluations over this Ray cluster, `auto` or an address.")] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
) -> None:
    """Prune a checkpoint's weights. A run that was stopped goes on when it is started again with the same recipe."""
    from evals.calibration import store
    from pruning.static.pipeline import run
    from pruning.static.recipe import read

    given = {"criterion": criterion, "pattern": pattern, "sparsity": sparsity, "vision_sparsity": vision_sparsity,
             "allocation": allocation, "score": score, "maximum": maximum, "average": average, "shared_budget": shared_budget,
             "samples": samples, "seed": seed, "data": data, "families": family, "visual_weight": visual_weight,
             "damping": damping, "block_size": block_size, "uniform_width": uniform_width, "levels": levels,
             "generations": generations, "offspring": offspring, "eta": eta, "projector": projector, "rounds": rounds,
             "reconstruct": reconstruct}  # fmt: skip
    with _plain_errors():
        asked = read(recipe, {name: value for name, value in given.items() if value is not None})
        run(asked, checkpoint, out, device, dtype, ray, finish=lambda made: store(made, 128, 0, device, "auto"))
        Console().print(f"pruned into {out}; look at it with `espalier inspect {out}`", highlight=False)


@app.command()
def route(
    checkpoint: CHECKPOINT,
    out: Annotated[Path, typer.Option(help="The directory to make: the checkpoint with its router.")],
    data: Annotated[str | None, typer.Option(help="world (default), or a JSONL file of pictures and questions.")] = None,
    pictures: Annotated[int | None, typer.Option(help="Pictures to watch on, a third of them held out; 3000 by default.")] = None,
    questions: Annotated[int | None, typer.Option(help="Questions about each, at most; 4 by default.")] = None,
    answer: Annotated[int | None, typer.Option(help="Tokens of an answer that are watched; 64 by default.")] = None,
    rows: Annotated[int | None, typer.Option(help="The router's width; an eighth of the model's by default, 64 at least.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of learning to foresee; 2500 by default.")] = None,
    writing: Annotated[int | None, typer.Option(help="Steps of learning to write into merged tokens; 2500 by default.")] = None,
    target: Annotated[float | None, typer.Option(help="Share of answers that level `auto` is to keep; 0.99 by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Which pictures, and every random choice; 0 by default.")] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
) -> None:
    """Train a router, from pictures and questions alone. A run that was stopped goes on when it is started again."""
    from pruning.dynamic.training.config import Lesson
    from pruning.dynamic.training.train import run

    given = {"data": data, "pictures": pictures, "questions": questions, "answer": answer, "rows": rows, "steps": steps,
             "writing": writing, "target": target, "seed": seed}  # fmt: skip
    with _plain_errors():
        lesson = Lesson.model_validate({name: value for name, value in given.items() if value is not None})
        run(lesson, checkpoint, out, device, dtype)
        Console().print(f"router in {out}; look at it with `espalier inspect {out}`", highlight=False)


@app.command()
def inspect(
    checkpoint: CHECKPOINT = "embedded",
    picture: Annotated[Path | None, typer.Option(help="Draw sparsity, search and accuracy to this file.")] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
) -> None:
    """Show what a checkpoint holds, and in which form: sizes, what was pruned and how, calibration, levels."""
    from evals.inspect import run

    with _plain_errors():
        run(checkpoint, picture, device, dtype)


@bench.command("engine")
def bench_engine(
    geometry: Annotated[str, typer.Option(help="tinyllava-1.1b, llava-1.5-7b or llava-1.5-13b.")] = "tinyllava-1.1b",
    route: Annotated[list[str] | None, typer.Option(help="Visual tokens x layers, such as 128x22; may repeat.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens each request makes.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each side, in turn; medians are reported.")] = 3,
    device: DEVICE = "cpu",
    dtype: DTYPE = "bfloat16",
    sparsity: Annotated[float | None, typer.Option(help="Measure pruned weights too, with this share of zeros.")] = None,
    pattern: Annotated[str, typer.Option(help="Where the zeros lie: unstructured or 2:4.")] = "unstructured",
    router: Annotated[bool, typer.Option("--router", help="Let an untrained router of real size choose the tokens.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Only the JSON document on the last line.")] = False,
) -> None:
    """Random weights at real geometry: the ceiling first, then us and transformers in the same run."""
    from benchmarks.engine import run

    with _plain_errors():
        run(geometry, route, batch, new_tokens, repeats, device, dtype, json, sparsity, pattern, router)


@bench.command("http")
def bench_http(
    url: Annotated[str, typer.Option(help="A running server.")] = "http://127.0.0.1:8000",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 4,
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 64,
    levels: Annotated[str, typer.Option(help="Mix of levels, such as off=1,strong=3.")] = "off=1",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    json: Annotated[bool, typer.Option("--json", help="Only the JSON document on the last line.")] = False,
) -> None:
    """Load a running server at a given concurrency and mix of levels."""
    from benchmarks.http import run

    with _plain_errors():
        run(url, concurrency, requests, levels, max_tokens, quiet=json)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors that a user can act on are one line, not a traceback; Ctrl-C ends a command with 130 whatever it met."""
    from models.manifest import CheckpointError

    with _interruption() as pressed:
        try:
            yield
        except (CheckpointError, ValueError, OSError) as error:
            if pressed:
                raise KeyboardInterrupt from error
            errors.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Fills the list when Ctrl-C comes: torch makes a ValueError of one that meets it asking for the length of a storage."""
    pressed: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored in the background, or a host's own: theirs to keep
        yield pressed
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
