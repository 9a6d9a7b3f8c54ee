"""Structured pruning: whole attention heads and whole FFN neurons go, and the matrices become smaller.

Heads are read by the output projection alone and neurons by the down projection alone, each through columns of its own. Those
columns are removed by structured OBS (ZipLM, Kurtic et al. 2023, arXiv 2302.04089), and what stays is moved to make up for them:
the exact least squares on what is kept (as in OSSCAR, Meng et al. 2024, arXiv 2403.12983). The rows that made what nobody reads any
more are then cut without further error. With grouped-query attention a KV head goes together with its query heads.

The three criteria are one method under three metrics H: the identity (`magnitude`), the diagonal of the Hessian (`wanda`), and the
damped Hessian (`obs`). Under the first two nothing that stays moves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.linalg import cholesky, solve_triangular
from transformers import LlavaForConditionalGeneration, PreTrainedConfig

from models.layer_shapes import (
    CoupledUnits,
    LayerShape,
    changed_keys,
    coupled_units,
    shape_of,
    slice_layer,
    slice_to_shape,
    towers,
    transformers_can_build,
    unit_indices,
)
from models.vision.clip import feature_layers
from pruning.static import obs
from pruning.static.blocks import VISION_GROUPS, Block, Call, collect
from pruning.static.criteria import criterion

ROUND = 64
"""One of so many units goes before the others are scored again, and at least one."""
ALIGN = 8
"""FFN widths are multiples of this, as fast matrix products ask for."""
WIDE, WIDE_ALIGN = 2048, 128
"""From this width on, a width that all layers share is a multiple of more."""


def inverse_metric(prepared: Tensor | obs.Factor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a criterion prepared for a weight [out, in], as H⁻¹ [in, in] float64, and which inputs are always zero: bool [in]."""
    size, device = weight.shape[1], weight.device
    if prepared is None:
        return torch.eye(size, dtype=torch.float64, device=device), torch.zeros(size, dtype=torch.bool, device=device)
    if isinstance(prepared, obs.Factor):
        upper = prepared.upper.double()
        return upper.T @ upper, prepared.dead
    dead = prepared == 0
    return torch.diag(1 / (2 * prepared.double().square()).masked_fill(dead, 1)), dead


def eliminate(weight: Tensor, inverse: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Remove unit after unit, those that cost least first, until one is left.

    weight [out, units * size] and inverse H⁻¹, both float64. Returns the order [units], with the one that is left as the last, and
    the loss [units] after none, one, two, ... are gone: the least ½ tr(Δ H Δᵀ) of all changes Δ of the weight that zero them. With
    H = 2 E[x xᵀ] that is the mean square of what the matrix adds wrongly to the residual stream.

    A unit with columns B costs ½ ‖W_B L⁻ᵀ‖² where L Lᵀ = (H⁻¹)_BB (ZipLM, section 3). Units of one round are chosen by their own
    costs and removed together, at their joint cost: the order is greedy, the losses are exact.
    """
    left = torch.arange(weight.shape[1] // size, device=weight.device)
    order, costs = [], [weight.new_zeros(1)]
    while (count := len(left)) > 1:
        own = inverse.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        reading = weight.reshape(-1, count, size).permute(1, 2, 0)
        scores = solve_triangular(cholesky(own), reading, upper=False).square().sum((1, 2))
        chosen, rest = scores.argsort(stable=True).tensor_split([max(count // ROUND, 1)])
        rest = rest.sort().values
        gone, stays = unit_indices(chosen, size), unit_indices(rest, size)
        lower = cholesky(inverse[gone][:, gone])
        error = solve_triangular(lower, weight[:, gone].T, upper=False)
        reach = solve_triangular(lower, inverse[gone][:, stays], upper=False)
        order.append(left[chosen])
        costs.append(error.square().sum(1).view(-1, size).sum(1) / 2)
        weight = weight[:, stays] - error.T @ reach
        inverse = inverse[stays][:, stays] - reach.T @ reach
        left = left[rest]
    return torch.cat([*order, left]), torch.cat(costs).cumsum(0)


def compensate(weight: Tensor, inverse: Tensor, gone: Tensor) -> Tensor:
    """The weight [out, in] with the columns `gone` at zero and the others where ½ tr(Δ H Δᵀ) is least: all in float64."""
    lower = cholesky(inverse[gone][:, gone])
    error = solve_triangular(lower, weight[:, gone].T, upper=False)
    moved = weight - error.T @ solve_triangular(lower, inverse[gone], upper=False)
    return moved.index_fill(1, gone, 0)  # they are zero but for rounding


@dataclass(frozen=True)
class Removal:
    """The order in which the units of one half of a block go, and what that costs."""

    half: CoupledUnits
    inverse: Tensor  # [in, in] float64
    order: Tensor  # [units]
    losses: Tensor  # [units]

    def loss(self, count: int) -> float:
        return float(self.losses[self.half.units - count])

    def kept(self, count: int) -> Tensor:
        """The `count` units that stay, ascending."""
        return self.order[self.half.units - count :].sort().values

    def weight(self, count: int) -> Tensor:
        """The weight of the matrix that reads them, at full size, zero where nothing is left to read."""
        weight = self.half.consumer.weight.detach()
        gone = unit_indices(self.order[: self.half.units - count], weight.shape[1] // self.half.units)
        return compensate(weight.double(), self.inverse, gone).to(weight.dtype)


@dataclass(frozen=True)
class Plan:
    """What a block can lose; the block is as it was until `apply`."""

    block: Block
    heads: Removal
    neurons: Removal
    damping: dict[str, float]  # of each Hessian that needed more than was asked for, by matrix

    def widths(self, kept: int) -> LayerShape:
        """The widths that keep `kept` weights, to the nearest ALIGN neurons, and lose least.

        Give the next block what this one kept too much, and the total holds to half of ALIGN neurons.
        """
        counts = range(1, self.heads.half.units + 1)
        return cheapest(self.weights_per_unit, (self.heads.losses, self.neurons.losses), kept, counts, ALIGN)

    @property
    def weights_per_unit(self) -> tuple[int, int]:
        return self.heads.half.weights_per_unit, self.neurons.half.weights_per_unit

    @torch.no_grad()
    def apply(self, widths: LayerShape) -> None:
        """Cut the block to these widths."""
        for removal, count in ((self.heads, widths.kv_heads), (self.neurons, widths.ffn)):
            removal.half.consumer.weight.copy_(removal.weight(count))
        slice_layer(self.block.module, self.heads.kept(widths.kv_heads), self.neurons.kept(widths.ffn))


def cheapest(
    weights_per_unit: tuple[int, int], losses: tuple[Tensor, Tensor], kept: int, kv_heads: Iterable[int], align: int
) -> LayerShape:
    """Of the widths with one of these numbers of KV heads, a multiple of `align` neurons and about `kept` weights, those that lose
    least. Weights and losses are of heads and of neurons.

    Both halves write to the residual stream, so their losses are in one unit and add up (ours; ZipLM solves the like for a latency
    over all layers). On the embedded checkpoint this keeps nearly all heads, and the same share of both halves does far worse.
    """
    group, neuron = weights_per_unit
    heads, ffn = (len(half) for half in losses)
    found = []
    for count in kv_heads:
        room = (kept - count * group) / neuron
        width = ffn if room >= ffn else min(round(room / align) * align, ffn)
        if width > 0 and room <= ffn + align / 2:
            found.append((float(losses[0][heads - count] + losses[1][ffn - width]), count, width))
    if not found:
        raise ValueError(f"no widths leave a block {kept} weights: a KV head has {group} and {align} neurons {align * neuron}")
    return LayerShape(*min(found)[1:])


@torch.no_grad()
def plan(block: Block, calls: Sequence[Call], name: str, damping: float = obs.DAMPING) -> Plan:
    """What each head and each neuron is worth by the criterion `name`, from one pass over `calls`. Errors name the matrix."""
    method = criterion(name, damping)
    readers = replace(block, groups=(block.groups[1], block.groups[3]))
    statistics = collect(readers, calls, method.empty, method.accumulate)
    found, retried = [], {}
    for matrix, half, gathered in zip(readers.linears(), coupled_units(block.module), statistics, strict=True):
        weight = half.consumer.weight.double()
        try:
            if not weight.isfinite().all():
                raise ValueError("the weights are not finite")
            prepared = method.prepare(gathered)
            inverse, dead = inverse_metric(prepared, weight)
            order, losses = eliminate(weight.masked_fill(dead, 0), inverse, weight.shape[1] // half.units)
        except ValueError as error:
            raise type(error)(f"{matrix}: {error}") from error
        except torch.linalg.LinAlgError as error:
            raise obs.HessianError(
                f"{matrix}: what is left of the Hessian is singular; use more calibration samples or a larger damping"
            ) from error
        if isinstance(prepared, obs.Factor) and prepared.retries:
            retried[matrix] = prepared.damping
        found.append(Removal(half, inverse, order, losses))
    heads, neurons = found
    return Plan(block, heads, neurons, retried)


@dataclass(frozen=True)
class Pruned:
    """What became of a block: its widths, the weights of its matrices before and after, and the loss in the criterion's metric."""

    widths: LayerShape
    before: int
    kept: int
    loss: float
    damping: dict[str, float]


def prune_block(
    block: Block, calls: Sequence[Call], name: str, wanted: int | LayerShape, damping: float = obs.DAMPING
) -> Pruned:  # fmt: skip
    """Cut a block to the weights or the widths that are wanted: between two steps of `walk`, whose next block sees the outcome."""
    before, found = weights(block), plan(block, calls, name, damping)
    widths = wanted if isinstance(wanted, LayerShape) else found.widths(wanted)
    loss = found.heads.loss(widths.kv_heads) + found.neurons.loss(widths.ffn)
    found.apply(widths)
    return Pruned(widths, before, weights(block), loss, found.damping)


def weights(block: Block) -> int:
    """Weights of a block's matrices; biases do not count."""
    return sum(linear.weight.numel() for linear in block.linears().values())


def tensors(block: Block) -> dict[str, Tensor]:
    """All that `prune_block` changes, by name: weights, and the biases that went along."""
    return {f"{name}.{key}": value for name, linear in block.linears().items() for key, value in linear.state_dict().items()}


def restore(block: Block, widths: LayerShape, saved: Mapping[str, Tensor]) -> None:
    """Make of a dense block the pruned one whose `tensors` were saved."""
    slice_to_shape(block.module, widths)
    for name, linear in block.linears().items():
        linear.load_state_dict({key: saved[f"{name}.{key}"] for key in linear.state_dict()})


def uniform_widths(
    config: PreTrainedConfig, steps: Iterable[tuple[Block, Sequence[Call]]], name: str, sparsity: float,
    damping: float = obs.DAMPING,
) -> LayerShape:  # fmt: skip
    """The same widths for all layers of a tower, of those that transformers loads with its own keys: they lose least in sum.

    `steps` is a `walk` through the dense tower, `config` the tower's. Those keys say only some numbers of heads, and in a vision
    tower none but its own. Raises ValueError where no widths come near the sparsity.
    """
    totals: list[Tensor] = []
    for block, calls in steps:
        found = plan(block, calls, name, damping)
        losses = [found.heads.losses, found.neurons.losses]
        totals = [total + loss for total, loss in zip(totals, losses, strict=True)] if totals else losses
    heads, neurons = totals
    counts = [count for count in range(1, len(heads) + 1) if transformers_can_build(config, LayerShape(count, len(neurons)))]
    kept = round((1 - sparsity) * weights(block))
    return cheapest(found.weights_per_unit, (heads, neurons), kept, counts, WIDE_ALIGN if len(neurons) >= WIDE else ALIGN)


def settle(model: LlavaForConditionalGeneration) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """Once all blocks are pruned: have the configuration say so. Returns the keys that changed, by tower, and tensors that did.

    Where all vision layers that are read have come to one width, those that nobody reads are cut to it: transformers builds them.
    """
    _, layers = towers(model)["vision_config"]
    used = max(feature_layers(model.config))
    unread = [Block("vision", i, layers[i], VISION_GROUPS) for i in range(used, len(layers))]
    alike = len({shape_of(layer) for layer in layers[:used]}) == 1
    cut = [block for block in unread if alike and shape_of(block.module) != shape_of(layers[0])]
    for block in cut:
        slice_to_shape(block.module, shape_of(layers[0]))
    changed = changed_keys(model)
    for tower, keys in changed.items():
        towers(model)[tower][0].update(keys)
    return changed, {name: tensor for block in cut for name, tensor in tensors(block).items()}
