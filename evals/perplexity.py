"""Perplexity of a checkpoint's language model on English text, without pictures, beside that of another: the one it was made of."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from math import exp
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.checkpoint import open_transformers

PASSAGE = 1024
"""Tokens of a passage; its first has nothing before it and is not predicted."""
PASSAGES = 64
"""Passages of all sources together: 65,536 tokens."""
LICENCES = ("numpy", "pillow")


def texts() -> dict[str, str]:
    """English text that is on every machine that can run this, by its source: Python's language reference, and the licences of
    packages that are needed here."""
    from pydoc_data.topics import topics

    found = {f"language reference of Python {platform.python_version()}": "\n\n".join(topics[name] for name in sorted(topics))}
    for package in LICENCES:
        about = metadata.distribution(package)
        files = sorted(str(about.locate_file(file)) for file in about.files or () if file.stem in ("LICENSE", "NOTICE"))
        found[f"licences of {package} {about.version}"] = "\n\n".join(Path(file).read_text("utf-8", "replace") for file in files)
    return {name: text for name, text in found.items() if text}


def passages(tokenizer: Any, limit: int) -> dict[str, Tensor]:
    """At most `limit` passages, by source: token ids [passages, PASSAGE]; what does not fill a passage is left out."""
    found = {}
    for name, text in reversed(texts().items()):  # the longest text comes last and fills what the others leave
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
        if count := min(limit, len(ids) // PASSAGE):
            found[name] = ids[: count * PASSAGE].view(count, PASSAGE)
            limit -= count
    return found


@torch.inference_mode()
def loss(model: PreTrainedModel, passage: Tensor) -> float:
    """Summed negative log-likelihood, in nats, of a passage's tokens but the first; float32."""
    logits = model(input_ids=passage[None].to(model.device), use_cache=False).logits[0, :-1]
    return float(F.cross_entropy(logits.float(), passage[1:].to(model.device), reduction="sum"))


def run(checkpoint: Path, against: Path | None, limit: int | None, device: str, dtype: str, quiet: bool) -> dict[str, Any]:
    """Measure and print; the last line is one JSON document, which is also returned. `against` is a GGUF file, or a directory that
    transformers loads, with the same vocabulary."""
    console = Console(stderr=True, quiet=quiet)
    opened = open_transformers(checkpoint, device, dtype)
    models = {opened.name: opened.model}
    if against:
        models[against.stem] = open_language_model(against, opened.model.dtype, device)
        sizes = [model.get_input_embeddings().num_embeddings for model in models.values()]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{against} has {sizes[1]} tokens in its vocabulary and {opened.name} has {sizes[0]}: not its kin")
    asked = passages(opened.preprocessor.tokenizer, limit or PASSAGES)
    losses = {name: _by_source(model, asked, name, console) for name, model in models.items()}
    document = summarise(losses, {source: ids.shape[0] * (PASSAGE - 1) for source, ids in asked.items()}) | {
        "checkpoint": opened.name, "fingerprint": opened.fingerprint, "dtype": str(opened.model.dtype).removeprefix("torch.")
    }  # fmt: skip
    _show(document, console)
    Console(soft_wrap=True, highlight=False, markup=False).print(json.dumps(document))
    return document


def open_language_model(path: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A language model of transformers' or of a GGUF file. Raises ValueError for what is neither."""
    if not path.exists():
        raise ValueError(f"{path} does not exist; name a GGUF file or a directory that transformers loads")
    directory, file = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    if file and (missing := [package for package in ("accelerate", "gguf") if not find_spec(package)]):
        raise ValueError(f"{path} is read with packages that are not installed; pip install {' '.join(missing)}")
    try:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True, **file).to(device).eval()
    except Exception as error:  # whatever transformers' parsers raise
        raise ValueError(f"{path} is not a language model that transformers loads: {' '.join(str(error).split())[:200]}") from error


def _by_source(model: PreTrainedModel, asked: dict[str, Tensor], name: str, console: Console) -> dict[str, float]:
    def each() -> Iterator[tuple[str, Tensor]]:
        yield from ((source, passage) for source, ids in asked.items() for passage in ids)

    total = dict.fromkeys(asked, 0.0)
    for source, passage in track(each(), name, sum(map(len, asked.values())), console=console):
        total[source] += loss(model, passage)
    return total


def summarise(losses: dict[str, dict[str, float]], tokens: dict[str, int]) -> dict[str, Any]:
    """Perplexities from summed losses, by source and over all; beside a second model, its own and the ratio to it."""

    def cell(sources: list[str]) -> dict[str, Any]:
        n = sum(tokens[source] for source in sources)
        ours, *others = (exp(sum(found[source] for source in sources) / n) for found in losses.values())
        return {"tokens": n, "perplexity": round(ours, 4)} | {
            key: round(value, 4) for other in others for key, value in (("against", other), ("ratio", ours / other))
        }

    return {"task": "perplexity"} | cell([*tokens]) | {"sources": {source: cell([source]) for source in tokens}}


def _show(document: dict[str, Any], console: Console) -> None:
    table = Table("text", "tokens", "perplexity", "against", "ratio", title=f"perplexity: {document['checkpoint']}")
    for name, cell in [*document["sources"].items(), ("all", document)]:
        table.add_row(name, *(f"{cell[key]:,}" if key in cell else "" for key in ("tokens", "perplexity", "against", "ratio")))
    console.print(table)
