"""How much each layer changes the hidden state, measured once per checkpoint: levels know from it which layers to skip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

from models.checkpoint import Checkpoint, load
from models.errors import CheckpointError
from models.forward import forward, prefill_input
from models.llava import Llava
from models.manifest import Calibration, write_manifest
from models.preprocess import Picture, Preprocessor
from models.route import Route
from pruning import samples


def calibrate(
    checkpoint: Path, data: str, count: int, seed: int, device: str = "cpu", dtype: str = "auto", quiet: bool = False,
    families: Sequence[str] = (),
) -> None:  # fmt: skip
    """Measure the layers of a checkpoint that was just made, on `count` samples of `data` (see `pruning.samples`), and write the
    result into its manifest.

    Raises CheckpointError and DataError.
    """
    read = samples.read(data, count, seed, answered=False, families=families)
    loaded = load(checkpoint, device, dtype)
    change = measure(loaded, read, count, seed, quiet)
    calibration = Calibration(layer_change=change, data=data, samples=count, seed=seed)
    write_manifest(loaded.directory, loaded.manifest.model_copy(update={"calibration": calibration}))


def measure(loaded: Checkpoint, read: Iterable[samples.Sample], count: int, seed: int, quiet: bool) -> list[float]:
    """`layer_change` on `count` samples, with one question to each. Raises CheckpointError where a layer overflows."""
    prompts = _prompts(loaded.preprocessor, read, seed)
    change = layer_change(loaded.model, track(prompts, "layer importance", count, console=Console(stderr=True, quiet=quiet)))
    if not all(map(isfinite, change)):
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{loaded.directory}: what its layers put out is not finite in {dtype}; use another --dtype or, where it was just "
            "trained, a lower --learning-rate"
        )
    return change


def _prompts(preprocessor: Preprocessor, read: Iterable[samples.Sample], seed: int) -> Iterator[tuple[list[int], Picture]]:
    """One question to each picture, whichever of its turns."""
    for number, sample in enumerate(read):
        question, _ = Random(f"{seed}/{number}").choice(sample.turns)
        picture = preprocessor.picture(sample.image)
        yield preprocessor.question(question, layout=picture.layout), picture


@torch.inference_mode()
def layer_change(model: Llava, prompts: Iterable[tuple[list[int], Picture]]) -> list[float]:
    """1 - cosine between each layer's input and output, mean over the rows of all prompts (ids and picture).

    ShortGPT's block influence (Men et al. 2024, arXiv 2403.03853, equation 1). The last layer's output is read by nothing that
    could be compared; it counts as 1 and always runs.
    """
    total = torch.zeros(model.num_layers, dtype=torch.float64)
    rows = 0
    for ids, picture in prompts:
        inputs: list[Tensor] = []
        visual = model.encode(picture.pixels, picture.layout).tokens[0]
        route = Route.full(len(visual), model.num_layers)
        cache = model.new_cache(route.rows(len(ids)))
        prompt = prefill_input(model, torch.tensor(ids, device=model.device), visual, route, cache)
        forward(model, [prompt], layer_hook=lambda _, hidden, to=inputs: to.append(hidden.float()))  # type: ignore[misc]
        for layer, (x, y) in enumerate(pairwise(inputs)):
            total[layer] += (1 - F.cosine_similarity(x, y, dim=-1)).sum().item()
        rows += len(ids)
    if not rows:
        raise ValueError("calibration needs at least one sample")
    change = (total / rows).tolist()
    change[-1] = 1.0
    return [round(value, 6) for value in change]
