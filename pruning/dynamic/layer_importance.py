"""How much each layer changes the hidden state, measured once per checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from models.forward import forward, prefill_input
from models.llava import Llava
from models.route import Route


@torch.inference_mode()
def layer_change(model: Llava, samples: Iterable[tuple[list[int], Tensor]]) -> list[float]:
    """1 - cosine between each layer's input and output, mean over the rows of all samples (prompt ids, pixels [n, 3, h, w]).

    The last layer's output is read by nothing that could be compared; it counts as 1 and always runs.
    """
    total = torch.zeros(model.num_layers, dtype=torch.float64)
    rows = 0
    for ids, pixels in samples:
        before: list[Tensor] = []
        visual = model.vision(pixels.to(model.device, model.dtype)).tokens.flatten(0, 1)
        route = Route.full(len(visual), model.num_layers)
        cache = model.new_cache(route.rows(len(ids)))
        work = prefill_input(model, torch.tensor(ids, device=model.device), visual, route, cache)
        forward(model, [work], layer_hook=lambda _, hidden, seen=before: seen.append(hidden.float()))  # type: ignore[misc]
        for layer, (x, y) in enumerate(pairwise(before)):
            total[layer] += (1 - F.cosine_similarity(x, y, dim=-1)).sum().item()
        rows += len(ids)
    if not rows:
        raise ValueError("calibration needs at least one sample")
    change = (total / rows).tolist()
    change[-1] = 1.0
    return [round(value, 6) for value in change]
