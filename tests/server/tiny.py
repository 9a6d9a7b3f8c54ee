"""A tiny LLaVA with random weights behind the embedded world's real tokenizer and processor; on disk, and loaded from there."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

from checkpoints.embedded.build import IMAGE, PATCH, SIZE, build_processor
from checkpoints.world import draw
from models.checkpoint import Checkpoint, load
from models.manifest import Calibration, Manifest, write_manifest
from models.random_llava import random_model
from pruning.dynamic.levels import Level, OperatingPoint
from server.engine import Engine, Limits
from server.request import Delta, Event, Failed, Finished, PreparedImage, Request, Sampling, Started, TokenLogprob

LAYERS = 3
LEVELS = ("off", "light", "balanced", "strong", "thin")
VISUAL = (SIZE // PATCH) ** 2


@cache
def processor() -> LlavaProcessor:
    return build_processor()


def config(layers: int = LAYERS) -> LlavaConfig:
    """144 visual tokens, a few narrow layers. Weights are large, so that every token, picture and layer shows in the answer."""
    tokenizer = processor().tokenizer
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE,
            patch_size=PATCH, projection_dim=32, initializer_factor=3.0,
        ),
        text_config=LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=len(tokenizer), max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=False,
            initializer_range=0.2,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE), image_seq_length=VISUAL,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip


def write(directory: Path, *, layers: int = LAYERS, **options: Any) -> Path:
    """Save a whole checkpoint in float32, calibration included; `options` go to transformers' save_pretrained."""
    tokenizer, model = processor().tokenizer, random_model(config(layers), seed=7)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    # Only words are likely: no answer ends by chance, and none hides its tokens behind bytes that are no characters.
    words = [re.fullmatch(" ?[A-Za-z0-9]+", tokenizer.decode([token])) is not None for token in range(len(tokenizer))]
    model.lm_head.weight.data *= torch.tensor(words)[:, None]
    model.save_pretrained(directory, **options)
    processor().save_pretrained(directory)
    change = [0.5, *[0.1] * (layers - 2), 1.0]
    calibration = Calibration(layer_change=change, data="none", samples=1, seed=0)
    write_manifest(directory, Manifest(trained_on="world", calibration=calibration))
    return directory


@pytest.fixture(scope="session", name="tiny")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return load(write(tmp_path_factory.mktemp("tiny") / "tiny-llava"), dtype="float32")


THIN = Level("thin", "few tokens and no middle layer", 1 / 6, (OperatingPoint(1 / 6, skipped_layers=1),))
"""A level that also skips a layer: the menu of a model this shallow has none."""


def new_engine(checkpoint: Checkpoint, name: str | None = None, **limits: int) -> Engine:
    """An engine that is stepped by hand or started, with `thin` on its menu."""
    engine = Engine(checkpoint, Limits(**{"kv_rows": 20_000, **limits}), name=name)
    engine.menu[THIN.name] = THIN
    return engine


@pytest.fixture(name="engine")
def stepped_engine(tiny: Checkpoint) -> Engine:
    return new_engine(tiny)


class Reader:
    """Collects one request's events, as the HTTP side would."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, (Finished, Failed)):
            self._ended.set()

    def wait(self) -> None:
        """For an engine that runs in its own thread."""
        assert self._ended.wait(60), "no end after a minute"

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def started(self) -> Started:
        return next(event for event in self.events if isinstance(event, Started))

    @property
    def end(self) -> Finished | Failed | None:
        """The last event, when it is the last."""
        ends = [event for event in self.events if isinstance(event, (Finished, Failed))]
        assert len(ends) <= 1
        assert not ends or self.events[-1] is ends[0]
        return ends[0] if ends else None

    @property
    def finished(self) -> Finished:
        assert isinstance(self.end, Finished), self.end
        return self.end

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        return tuple(one for event in self.events if isinstance(event, Delta) for one in event.logprobs)

    @property
    def answer(self) -> tuple[str, int, str]:
        return self.text, self.finished.completion_tokens, self.finished.reason


_numbers: Iterator[int] = count()


def ask(
    engine: Engine, pictures: tuple[int, ...] = (0,), text: str = "What color is the star?", level: str = "off",
    **sampling: Any,
) -> Request:
    """A request about pictures of the embedded world, by number, as the HTTP side would make it; `emit` is a Reader."""
    parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    images = []
    for number in pictures:
        image = draw("validation", number).image
        images.append(PreparedImage(engine.preprocessor.picture(image), sha256(image.tobytes()).hexdigest()))
    prompt = engine.preprocessor.prompt([{"role": "user", "content": parts}])
    options = Sampling(**{"max_tokens": 8, **sampling})
    return Request(f"request-{next(_numbers)}", prompt, images, level, options, Reader(), reason="body")


def submit(engine: Engine, *pictures: int, **options: Any) -> tuple[Request, Reader]:
    request = ask(engine, pictures or (0,), **options)
    engine.submit(request)
    assert isinstance(request.emit, Reader)
    return request, request.emit


def spoil(request: Any, pixels: torch.Tensor) -> Any:
    return replace(request, images=[PreparedImage(replace(request.images[0].picture, pixels=pixels[None]), "bad0bad0")])


def drain(engine: Engine, steps: int = 500) -> None:
    """Step until nobody is left, and check that everything was given back."""
    for _ in range(steps):
        if engine.scheduler.idle:
            break
        engine.step()
        engine.kv.check_integrity()
    assert_clean(engine)


def assert_clean(engine: Engine) -> None:
    engine.kv.check_integrity()
    assert engine.scheduler.idle
    assert engine.scheduler.used == engine.kv.used == 0


def answer(engine: Engine, *pictures: int, **options: Any) -> Reader:
    """One request alone."""
    _, reader = submit(engine, *pictures, **options)
    drain(engine)
    return reader


def value(engine: Engine, name: str, **labels: str) -> float:
    """A number as Prometheus would scrape it; 0 for one that never changed."""
    return engine.metrics.registry.get_sample_value(f"espalier_{name}", labels) or 0.0


def total(engine: Engine, name: str, **labels: str) -> float:
    """The sum over a metric's other labels."""
    return sum(
        sample.value
        for metric in engine.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == f"espalier_{name}" and labels.items() <= sample.labels.items()
    )


def same(got: Reader, expected: Reader) -> None:
    """The same tokens: the text may hide bytes that are no characters, so log-probabilities are compared too."""
    assert got.answer == expected.answer
    assert [one.token for one in got.logprobs] == [one.token for one in expected.logprobs]
    ours, theirs = ([one.logprob for one in reader.logprobs] for reader in (got, expected))
    assert ours == pytest.approx(theirs, abs=1e-3)
