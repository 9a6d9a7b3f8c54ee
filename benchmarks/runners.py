"""The two runners of the comparison, our forward and transformers, on one copy of the weights and the same prompts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, astuple, dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import torch
from torch import Size, Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from models.forward import decode_inputs, forward, prefill_input
from models.layer_shapes import LayerShape, layer_shapes, slice_to_shape, towers
from models.linear import Linear
from models.llava import Llava, from_transformers
from models.quantized import QUANTIZED
from models.random_llava import random_model
from models.route import Route
from models.sparse import AnyLinear
from models.vision.vit import VisionTransformer, feature_layers
from models.weight_format import choose_format
from pruning.answers import Prompt
from pruning.dynamic.router import Router, score_request, text_window
from pruning.dynamic.token_merging import merge_tokens

TEXT_TOKENS = 40
PAIRS = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool)
"""The ways to keep two of four weights."""


@dataclass(frozen=True)
class Prompts:
    """A picture and some words each: `ids` [batch, prompt], image tokens expanded; `pixels` [batch, 3, size, size]."""

    ids: Tensor
    pixels: Tensor

    def first(self) -> Prompts:
        return Prompts(self.ids[:1], self.pixels[:1])


@dataclass(frozen=True)
class Timing:
    """One timed run, in seconds: `ttft` to the first tokens of all prompts, `tpot` from a token to the next (median), `e2e` in all.

    Of `ttft`, `encode` went to the pictures and `route` to the router, `prefill` to the prompts, as far as that can be told.
    `kv_bytes` are those of one request's cache; `output_ids` are [request][step].
    """

    ttft: float
    tpot: float
    e2e: float
    output_ids: list[list[int]]
    encode: float = 0.0
    route: float = 0.0
    kv_bytes: int = 0

    @property
    def prefill(self) -> float:
        return self.ttft - self.encode - self.route

    @classmethod
    def of(cls, start: float, token_times: Sequence[float], output_ids: list[list[int]], **stages: Any) -> Timing:
        """`token_times` are when the caller had each token."""
        steps = [after - before for before, after in pairwise(token_times)]
        return cls(token_times[0] - start, median(steps), token_times[-1] - start, output_ids, **stages)


class Runner(Protocol):
    def run(self, prompts: Prompts, new_tokens: int) -> Timing:
        """Answer greedily with `new_tokens` tokens each, at least 2."""


@dataclass(frozen=True)
class EspalierRunner:
    """Our forward: all prompts in one batch. A `router` chooses the visual tokens, as many as the route keeps; or they are merged
    to as many, as levels do without a router. The tower's later layers see `patch_ratio` of the patches."""

    model: Llava
    route: Route
    router: Router | None = None
    merging: bool = False
    patch_ratio: float = 1.0

    @torch.inference_mode()
    def run(self, prompts: Prompts, new_tokens: int) -> Timing:
        model, route, start = self.model, self.route, time.perf_counter()
        length = prompts.ids.shape[1]
        caches = [model.new_cache(route.rows(length, new_tokens - 1)) for _ in prompts.ids]
        visual = model.vision(prompts.pixels, self.patch_ratio).tokens
        encoded = _finished(model)
        routed = [self._route(ids, tokens) for ids, tokens in zip(prompts.ids, visual, strict=True)]
        routed_at = _finished(model)
        inputs = [
            prefill_input(model, ids, tokens, own, cache)
            for ids, (own, tokens), cache in zip(prompts.ids, routed, caches, strict=True)
        ]
        token_times, steps = [], []
        for position in range(length, length + new_tokens):
            ids = forward(model, inputs).argmax(-1)
            steps.append(ids.tolist())  # waits for the device, as a server must to send the token
            token_times.append(time.perf_counter())
            inputs = decode_inputs(model, ids, [position] * len(ids), [(own.route, own.cache) for own in inputs])
        output_ids = [list(tokens) for tokens in zip(*steps, strict=True)]
        stages = {"encode": encoded - start, "route": routed_at - encoded, "kv_bytes": caches[0].nbytes}
        return Timing.of(start, token_times, output_ids, **stages)

    def _route(self, ids: Tensor, visual: Tensor) -> tuple[Route, Tensor]:
        """The route with the tokens that are kept, and the visual tokens [visual tokens, width] as the router or merging leaves
        them."""
        keep = len(self.route.kept_tokens)
        if not self.route.dropped or not (self.router or self.merging):
            return self.route, visual
        if self.router:
            prompt = Prompt(ids.tolist(), visual)
            text = text_window(prompt.ids, self.model.config.image_token_id)
            (kept,) = score_request(self.router, self.model, [prompt.image], text).keep_tokens(keep)
        else:
            kept = merge_tokens(visual, keep)
        return replace(self.route, kept_tokens=tuple(kept.indices.tolist()), token_sizes=kept.sizes), kept.tokens


@dataclass(frozen=True)
class TransformersRunner:
    """transformers' `generate`: the first prompt alone, all visual tokens and layers."""

    model: LlavaForConditionalGeneration

    def run(self, prompts: Prompts, new_tokens: int) -> Timing:
        first, streamer, start = prompts.first(), TokenTimes(), time.perf_counter()
        out = self.model.generate(
            input_ids=first.ids, attention_mask=torch.ones_like(first.ids), pixel_values=first.pixels,
            do_sample=False, use_cache=True, max_new_tokens=new_tokens, streamer=streamer,
            eos_token_id=None,  # random weights may say anything, the end included
        )  # fmt: skip
        return Timing.of(start, streamer.times[1:], out[:, first.ids.shape[1] :].tolist())  # the first time is the prompt's


class TokenTimes(BaseStreamer):
    """When `generate` hands over each token; by then the device has finished it."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


def _finished(model: Llava) -> float:
    """The time, once the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def random_prompts(model: Llava, batch: int) -> Prompts:
    """Random words, and a picture of its own for each request."""
    config, random = model.config, torch.Generator().manual_seed(0)
    image, size = config.image_token_id, config.vision_config.image_size
    text = torch.randint(3, image, (batch, TEXT_TOKENS), generator=random)
    picture = torch.full((batch, model.visual_tokens_per_image), image)
    pixels = torch.randn(batch, config.vision_config.num_channels, size, size, generator=random)
    ids = torch.cat([text[:, :1], picture, text[:, 1:]], dim=1)
    return Prompts(ids.to(model.device), pixels.to(model.device, model.dtype))


def share_weights(reference: LlavaForConditionalGeneration) -> Llava:
    """Fuse the weights of a transformers model for our forward and give them back as views: both run on the same single copy.

    The vision layers that LLaVA never reads go back as well, for transformers runs them.
    """
    encoder, projector = reference.model.vision_tower.encoder, reference.model.multi_modal_projector
    layers = list(encoder.layers)
    model = from_transformers(reference)
    encoder.layers = nn.ModuleList(layers)
    tower = model.vision.tower
    assert isinstance(tower, VisionTransformer)
    for layer, vision in zip(layers, tower.layers, strict=False):
        give_back(vision.qkv, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        give_back(vision.out, layer.self_attn.out_proj)
        give_back(vision.up, layer.mlp.fc1)
        give_back(vision.down, layer.mlp.fc2)
    for layer, block in zip(reference.model.language_model.layers, model.decoder_layers, strict=True):
        give_back(block.qkv, layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        give_back(block.out, layer.self_attn.o_proj)
        give_back(block.gate_up, layer.mlp.gate_proj, layer.mlp.up_proj)
        give_back(block.down, layer.mlp.down_proj)
    for matrix, module in zip(model.vision.projector, (projector.linear_1, projector.linear_2), strict=True):
        give_back(matrix, module)
    give_back(model.head, reference.lm_head)
    return model


def give_back(fused: AnyLinear, *modules: nn.Linear) -> None:
    """Undo `models.linear.fuse` without a copy: rows of a fused [out, in] matrix lie together, and multiply as fast."""
    assert isinstance(fused, Linear), "random weights have no zeros, for which loading would compress them"
    sizes = [module.out_features for module in modules]
    for module, weight in zip(modules, fused.weight.split(sizes), strict=True):
        module.weight = nn.Parameter(weight, requires_grad=False)
    if fused.bias is not None:
        for module, bias in zip(modules, fused.bias.split(sizes), strict=True):
            module.bias = nn.Parameter(bias, requires_grad=False)


def prune_randomly(model: Llava, sparsity: float, pattern: str) -> Llava:
    """The same model with random weights of its language layers set to zero, and each matrix in the format that loading chooses.

    What is not pruned is shared. `pattern` is `unstructured`, or `2:4`, which is a sparsity of one half.
    """
    random, device = torch.Generator(model.device).manual_seed(0), model.device

    def mask(shape: Size) -> Tensor:
        if pattern == "2:4":
            chosen = torch.randint(len(PAIRS), (shape[0], shape[1] // 4), generator=random, device=device)
            return PAIRS.to(device)[chosen].view(shape)
        return torch.rand(shape, generator=random, device=device) >= sparsity

    def pruned(matrix: AnyLinear) -> AnyLinear:
        assert isinstance(matrix, Linear), "dense before it is pruned"
        return choose_format(Linear(matrix.weight * mask(matrix.weight.shape), matrix.bias))

    layers = [
        replace(b, qkv=pruned(b.qkv), out=pruned(b.out), gate_up=pruned(b.gate_up), down=pruned(b.down))
        for b in model.decoder_layers
    ]
    return replace(model, decoder_layers=layers)


def cut_out(model: Llava, share: float) -> Llava:
    """A model of random weights, without a share of the heads and neurons of each layer of the language model and of the tower:
    smaller dense matrices, as structured pruning leaves. At least one KV head stays."""
    reference = random_model(deepcopy(model.config), dtype=model.dtype, device=str(model.device))
    for config, layers in towers(reference).values():
        kept = [LayerShape(*(max(1, round(units * (1 - share))) for units in astuple(one))) for one in layer_shapes(config)]
        for layer, shape in zip(layers, kept, strict=True):
            slice_to_shape(layer, shape)
        config.layer_shapes = [asdict(shape) for shape in kept]
    return from_transformers(reference)


def quantize(model: Llava, kind: str) -> Llava:
    """The same model with all matrices quantized but the head, as loading does."""

    def few_bits(matrix: AnyLinear) -> AnyLinear:
        assert isinstance(matrix, Linear), "dense before it is quantized"
        return QUANTIZED[kind].of(matrix)

    tower = model.vision.tower
    assert isinstance(tower, VisionTransformer)
    seeing = [replace(b, qkv=few_bits(b.qkv), out=few_bits(b.out), up=few_bits(b.up), down=few_bits(b.down)) for b in tower.layers]
    first, second = map(few_bits, model.vision.projector)
    layers = [
        replace(b, qkv=few_bits(b.qkv), out=few_bits(b.out), gate_up=few_bits(b.gate_up), down=few_bits(b.down))
        for b in model.decoder_layers
    ]
    vision = replace(model.vision, tower=replace(tower, layers=seeing), projector=(first, second))
    return replace(model, vision=vision, decoder_layers=layers)


def transformers_only_bytes(reference: LlavaForConditionalGeneration, model: Llava) -> int:
    unused = reference.model.vision_tower.encoder.layers[max(feature_layers(model.config)) :]
    return sum(parameter.nbytes for parameter in unused.parameters())
