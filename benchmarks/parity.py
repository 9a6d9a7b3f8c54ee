"""Does our forward at level `off` say what transformers says, on this device? Random weights: tiny in float32, and a geometry."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaConfig

from benchmarks.report import finish
from benchmarks.runners import EspalierRunner, TransformersRunner, random_prompts, share_weights
from models.forward import forward, prefill_input
from models.random_llava import geometry_config, random_model, tiny_config
from models.route import Route

NEW_TOKENS = 16
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.1}
"""Of the first logits: the largest difference, as a share of the largest logit."""


def run(geometry: str, device: str, dtype: str) -> dict[str, Any]:
    """Compare and print; the last line is one JSON document, which is also returned. Raises ValueError where they differ."""
    document = {f"tiny {kind}": compare(tiny_config(kind), device, "float32") for kind in ("llama", "mistral", "qwen2")}
    document[geometry] = compare(geometry_config(geometry), device, dtype)
    document = finish(document)
    wrong = [name for name, one in document.items() if not one["difference"] <= one["tolerance"]]
    if wrong:
        raise ValueError(f"the logits of {', '.join(wrong)} are not those of transformers")
    return document


@torch.inference_mode()
def compare(config: LlavaConfig, device: str, dtype: str) -> dict[str, Any]:
    """`difference` of the first logits, and the first `equal_tokens` of greedy decoding, which differs after any near tie."""
    reference = random_model(config, seed=1, dtype=getattr(torch, dtype), device=device)
    model = share_weights(reference)
    prompts, route = random_prompts(model, 1), Route.full(config.image_seq_length, model.num_layers)
    expected = reference(input_ids=prompts.ids, pixel_values=prompts.pixels).logits[0, -1].float()
    ids, visual = prompts.ids[0], model.vision(prompts.pixels).tokens[0]
    ours = forward(model, [prefill_input(model, ids, visual, route, model.new_cache(route.rows(len(ids))))])[0].float()
    runners = (EspalierRunner(model, route), TransformersRunner(reference))
    (said,), (wanted,) = (runner.run(prompts, NEW_TOKENS).output_ids for runner in runners)
    return {
        "dtype": dtype,
        "difference": float((ours - expected).abs().max() / expected.abs().max()),
        "tolerance": TOLERANCE[dtype],
        "equal_tokens": next((i for i, (a, b) in enumerate(zip(said, wanted, strict=True)) if a != b), NEW_TOKENS),
        "new_tokens": NEW_TOKENS,
    }
