"""The two sides of the comparison, our forward and transformers, on one copy of the weights and the same questions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Size, Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from models.forward import decode_input, forward, prefill_input
from models.linear import Linear
from models.llava import Llava, from_transformers
from models.route import Route
from models.sparse import AnyLinear
from models.vision.clip import ClipTower, feature_layers
from models.weight_format import choose_format
from pruning.dynamic.router import Router, score_request, text_window
from pruning.dynamic.training.teacher import Prompt

TEXT_TOKENS = 40


@dataclass(frozen=True)
class Questions:
    """A picture and some words each: `ids` [batch, prompt], image tokens expanded; `pixels` [batch, 3, size, size]."""

    ids: Tensor
    pixels: Tensor

    def first(self) -> Questions:
        return Questions(self.ids[:1], self.pixels[:1])


@dataclass(frozen=True)
class Run:
    """One timed run. `ttft`, the median `tpot` of the later tokens and `total` in seconds; `tokens` [request][step].

    Of `ttft`, `encode` and `route` went to the pictures and to the router, `prefill` to the prompts, as far as that can be told.
    `kv_bytes` are those of one request's cache.
    """

    ttft: float
    tpot: float
    total: float
    tokens: list[list[int]]
    encode: float = 0.0
    route: float = 0.0
    kv_bytes: int = 0

    @property
    def prefill(self) -> float:
        return self.ttft - self.encode - self.route

    @classmethod
    def of(cls, start: float, marks: Sequence[float], tokens: list[list[int]], **parts: Any) -> Run:
        """`marks` are the times when each token was in the caller's hands."""
        steps = [after - before for before, after in pairwise(marks)]
        return cls(marks[0] - start, median(steps), marks[-1] - start, tokens, **parts)


def draw_questions(model: Llava, batch: int) -> Questions:
    """Random words, and a picture of its own for each request."""
    config, random = model.config, torch.Generator().manual_seed(0)
    image, size = config.image_token_id, config.vision_config.image_size
    text = torch.randint(3, image, (batch, TEXT_TOKENS), generator=random)
    picture = torch.full((batch, model.visual_tokens_per_image), image)
    pixels = torch.randn(batch, config.vision_config.num_channels, size, size, generator=random)
    ids = torch.cat([text[:, :1], picture, text[:, 1:]], dim=1)
    return Questions(ids.to(model.device), pixels.to(model.device, model.dtype))


def share_weights(reference: LlavaForConditionalGeneration) -> Llava:
    """Fuse the weights of a transformers model for our forward and lend them back: both run on the same single copy.

    The vision layers that LLaVA never reads go back as well, for transformers runs them.
    """
    encoder, projector = reference.model.vision_tower.encoder, reference.model.multi_modal_projector
    layers = list(encoder.layers)
    model = from_transformers(reference)
    encoder.layers = nn.ModuleList(layers)
    tower = model.vision.tower
    assert isinstance(tower, ClipTower)
    for layer, vision in zip(layers, tower.layers, strict=False):
        lend(vision.qkv, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        lend(vision.out, layer.self_attn.out_proj)
        lend(vision.up, layer.mlp.fc1)
        lend(vision.down, layer.mlp.fc2)
    for layer, block in zip(reference.model.language_model.layers, model.decoder_layers, strict=True):
        lend(block.qkv, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        lend(block.out, layer.self_attn.o_proj)
        lend(block.gate_up, layer.mlp.gate_proj, layer.mlp.up_proj)
        lend(block.down, layer.mlp.down_proj)
    for matrix, module in zip(model.vision.projector, (projector.linear_1, projector.linear_2), strict=True):
        lend(matrix, module)
    lend(model.head, reference.lm_head)
    return model


def lend(fused: AnyLinear, *modules: nn.Linear) -> None:
    """Undo `models.linear.fuse` without a copy: rows of a fused [out, in] matrix lie together, and multiply as fast."""
    assert isinstance(fused, Linear), "random weights have no zeros, for which loading would compress them"
    sizes = [module.out_features for module in modules]
    for module, weight in zip(modules, fused.weight.split(sizes), strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
    if fused.bias is not None:
        for module, bias in zip(modules, fused.bias.split(sizes), strict=True):
            module.bias = nn.Parameter(bias, requires_grad=False)


PAIRS = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
"""The ways to keep two of four weights."""


def prune(model: Llava, sparsity: float, pattern: str) -> Llava:
    """The same model with random weights of its language layers set to zero, and each matrix in the form that loading chooses.

    What is not pruned is shared. `pattern` is `unstructured`, or `2:4`, which is a sparsity of one half.
    """
    random = torch.Generator().manual_seed(0)

    def kept(shape: Size) -> Tensor:
        if pattern == "2:4":
            return PAIRS[torch.randint(len(PAIRS), (shape[0], shape[1] // 4), generator=random)].view(shape)
        return torch.rand(shape, generator=random) >= sparsity

    def pruned(matrix: AnyLinear) -> AnyLinear:
        assert isinstance(matrix, Linear), "dense before it is pruned"
        return choose_format(Linear(matrix.weight * kept(matrix.weight.shape).to(matrix.weight.device), matrix.bias))

    layers = [
        replace(b, qkv=pruned(b.qkv), out=pruned(b.out), gate_up=pruned(b.gate_up), down=pruned(b.down))
        for b in model.decoder_layers
    ]
    return replace(model, decoder_layers=layers)


def transformers_only_bytes(reference: LlavaForConditionalGeneration, model: Llava) -> int:
    unused = reference.model.vision_tower.encoder.layers[max(feature_layers(model.config)) :]
    return sum(parameter.nbytes for parameter in unused.parameters())


@torch.inference_mode()
def answer(model: Llava, questions: Questions, route: Route, new_tokens: int, router: Router | None = None) -> Run:
    """All questions at once, greedily: one pass for the pictures, one for the prompts, then one per new token.

    With a `router` it is that which chooses the visual tokens, as many as the route keeps.
    """
    start = time.perf_counter()
    prompt = questions.ids.shape[1]
    caches = [model.new_cache(route.rows(prompt, new_tokens - 1)) for _ in questions.ids]
    visual = model.vision(questions.pixels).tokens
    encoded = _finished(model)
    chosen = [(route, seen) for seen in visual]
    if router and route.dropped:
        chosen = [choose_tokens(router, model, ids, seen, route) for ids, seen in zip(questions.ids, visual, strict=True)]
    routed = _finished(model)
    work = [
        prefill_input(model, ids, seen, own, cache)
        for ids, (own, seen), cache in zip(questions.ids, chosen, caches, strict=True)
    ]
    marks, steps = [], []
    for position in range(prompt, prompt + new_tokens):
        tokens = forward(model, work).argmax(-1)
        steps.append(tokens.tolist())  # waits for the device, as a server must to send the token
        marks.append(time.perf_counter())
        work = [
            decode_input(model, token, position, own.route, own.cache)
            for token, own in zip(tokens.split(1), work, strict=True)
        ]
    made = [list(tokens) for tokens in zip(*steps, strict=True)]
    return Run.of(start, marks, made, encode=encoded - start, route=routed - encoded, kv_bytes=caches[0].nbytes)


def choose_tokens(router: Router, model: Llava, ids: Tensor, visual: Tensor, route: Route) -> tuple[Route, Tensor]:
    """The route with the tokens that the router keeps, and the visual tokens [visual tokens, width] as it leaves them."""
    prompt = Prompt(ids.tolist(), visual)
    routing = score_request(router, model, [prompt.image], text_window(prompt.ids, model.config.image_token_id))
    (kept,) = routing.keep_tokens(len(route.kept_tokens))
    return replace(route, kept_tokens=tuple(kept.indices.tolist()), token_sizes=kept.sizes), kept.tokens


def _finished(model: Llava) -> float:
    """The time, once the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


class Marks(BaseStreamer):
    """Notes when `generate` hands over each token, by when the device has finished it."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


def generate(reference: LlavaForConditionalGeneration, question: Questions, new_tokens: int) -> Run:
    """One question through transformers, greedily, all visual tokens and layers."""
    marks, start = Marks(), time.perf_counter()
    out = reference.generate(
        input_ids=question.ids, attention_mask=torch.ones_like(question.ids), pixel_values=question.pixels,
        do_sample=False, use_cache=True, max_new_tokens=new_tokens, streamer=marks,
        eos_token_id=None,  # random weights may say anything, the end included
    )  # fmt: skip
    return Run.of(start, marks.at[1:], out[:, question.ids.shape[1] :].tolist())  # the first mark is the prompt's
