"""Structured pruning: whole attention heads and whole FFN neurons go, and the matrices become smaller. Of the language model, and
of a vision transformer alike.

Heads are read by the output projection alone and neurons by the down projection alone, each through columns of its own. Those
columns are removed by structured OBS (ZipLM, Kurtic et al. 2023, arXiv 2302.04089), and the others are changed to make up for them:
the exact least squares on what is kept (as in OSSCAR, Meng et al. 2024, arXiv 2403.12983). The rows that made what nobody reads any
more are then cut without further error. With grouped-query attention a KV head goes together with its query heads. A bias is the
weight of an input that is always one and never goes: so it takes over what the removed units gave on average (ours).

The three criteria are one method under three metrics H: the identity (`magnitude`), the diagonal of the Hessian (`wanda`), and the
damped Hessian (`obs`). Under the first two, what stays is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import cholesky, solve_triangular
from transformers import PreTrainedModel

from models.layer_shapes import (
    CoupledUnits,
    LayerShape,
    changed_keys,
    coupled_units,
    slice_layer,
    slice_to_shape,
    towers,
    unit_indices,
)
from pruning.static import obs
from pruning.static.blocks import Block, BlockInput, input_statistics
from pruning.static.criteria import CRITERIA

ROUND = 64
"""One of so many units goes before the others are scored again, and at least one."""
ALIGN = 8
"""FFN widths are multiples of this, as fast matrix products ask for."""


def weight_and_bias(linear: nn.Linear) -> Tensor:
    """[out, in], and one more column for a bias: float64."""
    bias = [] if linear.bias is None else [linear.bias[:, None]]
    return torch.cat([linear.weight, *bias], dim=1).detach().double()


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


def removal_order(weight: Tensor, inverse: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Remove unit after unit, those that cost least first, until one is left.

    weight [out, units * size] and inverse H⁻¹, both float64. Returns the order [units], with the one that is left as the last, and
    the loss [units] after none, one, two, ... are removed: the least ½ tr(Δ H Δᵀ) of all changes Δ of the weight that zero them.
    With H = 2 E[x xᵀ] that is the mean squared error of what the matrix adds to the residual stream.

    A unit with columns B costs ½ ‖W_B L⁻ᵀ‖² where L Lᵀ = (H⁻¹)_BB (ZipLM, section 3). Units of one round are chosen by their own
    costs and removed together, at their joint cost: the order is greedy, the losses are exact.
    """
    left = torch.arange(weight.shape[1] // size, device=weight.device)
    order, costs = [], [weight.new_zeros(1)]
    while (count := len(left)) > 1:
        own = inverse.reshape(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        columns = weight.reshape(-1, count, size).permute(1, 2, 0)
        scores = solve_triangular(cholesky(own), columns, upper=False).square().sum((1, 2))
        chosen, rest = scores.argsort(stable=True).tensor_split([max(count // ROUND, 1)])
        rest = rest.sort().values
        removed, kept = unit_indices(chosen, size), unit_indices(rest, size)
        lower = cholesky(inverse[removed][:, removed])
        error = solve_triangular(lower, weight[:, removed].T, upper=False)
        update = solve_triangular(lower, inverse[removed][:, kept], upper=False)
        order.append(left[chosen])
        costs.append(error.square().sum(1).view(-1, size).sum(1) / 2)
        weight = weight[:, kept] - error.T @ update
        inverse = inverse[kept][:, kept] - update.T @ update
        left = left[rest]
    return torch.cat([*order, left]), torch.cat(costs).cumsum(0)


def compensate(weight: Tensor, inverse: Tensor, removed: Tensor) -> Tensor:
    """The weight [out, in] with the columns `removed` at zero and the others where ½ tr(Δ H Δᵀ) is least: all in float64."""
    lower = cholesky(inverse[removed][:, removed])
    error = solve_triangular(lower, weight[:, removed].T, upper=False)
    updated = weight - error.T @ solve_triangular(lower, inverse[removed], upper=False)
    return updated.index_fill(1, removed, 0)  # they are zero but for rounding


@dataclass(frozen=True)
class Removal:
    """The order in which the heads or the neurons of a block are removed, and what that costs."""

    coupled: CoupledUnits
    inverse: Tensor  # [in, in] float64; one row and column more for a bias
    order: Tensor  # [units]
    losses: Tensor  # [units]

    def loss(self, count: int) -> float:
        """With `count` units kept."""
        return float(self.losses[self.coupled.units - count])

    def kept(self, count: int) -> Tensor:
        """The `count` units that stay, ascending."""
        return self.order[self.coupled.units - count :].sort().values

    def parameters(self, count: int) -> dict[str, Tensor]:
        """The `weight` of the matrix that reads them, at full size, zero where nothing is left to read, and its `bias`."""
        consumer = self.coupled.consumer
        removed = unit_indices(self.order[: self.coupled.units - count], consumer.in_features // self.coupled.units)
        columns = compensate(weight_and_bias(consumer), self.inverse, removed).to(consumer.weight.dtype)
        weight, bias = columns.tensor_split([consumer.in_features], dim=1)
        return {"weight": weight} if consumer.bias is None else {"weight": weight, "bias": bias[:, 0]}


@dataclass(frozen=True)
class BlockRemovals:
    """What a block can lose; the block is as it was until `apply`."""

    block: Block
    heads: Removal
    neurons: Removal
    damping: dict[str, float]  # of each Hessian that needed more than usual, by matrix

    def cheapest(self, weights: int) -> LayerShape:
        """Of the shapes with about `weights` weights and a multiple of ALIGN neurons, the one that loses least.

        Heads and neurons both write to the residual stream, so their losses are in one unit and add up (ours; ZipLM solves the like
        for a latency over all layers). On the embedded checkpoint this keeps nearly all heads, and the same share of both does far
        worse. Add to the next block's `weights` what this one kept too little, and the total holds to half of ALIGN neurons.
        """
        heads, neurons = self.heads.coupled, self.neurons.coupled
        found = []
        for kv_heads in range(1, heads.units + 1):
            wanted = (weights - kv_heads * heads.weights_per_unit) / neurons.weights_per_unit
            ffn = neurons.units if wanted >= neurons.units else min(round(wanted / ALIGN) * ALIGN, neurons.units)
            if ffn > 0 and wanted <= neurons.units + ALIGN / 2:
                shape = LayerShape(kv_heads, ffn)
                found.append((self.loss(shape), kv_heads, ffn))
        if not found:
            raise ValueError(
                f"no shape leaves a block {weights} weights: "
                f"a KV head has {heads.weights_per_unit} and {ALIGN} neurons {ALIGN * neurons.weights_per_unit}"
            )
        return LayerShape(*min(found)[1:])

    def loss(self, shape: LayerShape) -> float:
        """In the criterion's metric."""
        return self.heads.loss(shape.kv_heads) + self.neurons.loss(shape.ffn)

    @torch.no_grad()
    def apply(self, shape: LayerShape) -> None:
        """Cut the block to this shape."""
        for removal, count in ((self.heads, shape.kv_heads), (self.neurons, shape.ffn)):
            removal.coupled.consumer.load_state_dict(removal.parameters(count))
        slice_layer(self.block.layer, self.heads.kept(shape.kv_heads), self.neurons.kept(shape.ffn))


@torch.no_grad()
def removals(block: Block, inputs: Sequence[BlockInput], name: str) -> BlockRemovals:
    """In which order the criterion `name` removes heads and neurons, from one pass over `inputs`. Errors name the matrix."""
    criterion = CRITERIA[name]
    consumers = replace(block, groups=(block.groups[1], block.groups[3]))
    statistics = input_statistics(consumers, inputs, criterion.empty, criterion.accumulate, biases=True)
    found, damping = [], {}
    for matrix, coupled, gathered in zip(consumers.linears(), coupled_units(block.layer), statistics, strict=True):
        weight, width = weight_and_bias(coupled.consumer), coupled.consumer.in_features
        try:
            if not weight.isfinite().all():
                raise ValueError("the weights are not finite")
            prepared = criterion.prepare(gathered)
            inverse, dead = inverse_metric(prepared, weight)
            live = weight.masked_fill(dead, 0)[:, :width]
            order, losses = removal_order(live, inverse[:width, :width], width // coupled.units)
        except ValueError as error:
            raise type(error)(f"{matrix}: {error}") from error
        except torch.linalg.LinAlgError as error:
            raise obs.HessianError(f"{matrix}: what is left of the Hessian is singular; use more calibration samples") from error
        if isinstance(prepared, obs.Factor) and prepared.retries:
            damping[matrix] = prepared.damping
        found.append(Removal(coupled, inverse, order, losses))
    heads, neurons = found
    return BlockRemovals(block, heads, neurons, damping)


def weight_count(block: Block) -> int:
    """Weights of a block's matrices; biases do not count."""
    return sum(linear.weight.numel() for linear in block.linears().values())


def tensors(block: Block) -> dict[str, Tensor]:
    """Weights and biases of a block's matrices, by name."""
    return {f"{name}.{key}": value for name, linear in block.linears().items() for key, value in linear.state_dict().items()}


def restore(block: Block, shape: LayerShape, saved: Mapping[str, Tensor]) -> None:
    """Make of a dense block the pruned one whose `tensors` were saved."""
    slice_to_shape(block.layer, shape)
    for name, linear in block.linears().items():
        linear.load_state_dict({key: saved[f"{name}.{key}"] for key in linear.state_dict()})


def update_config(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Once all blocks are pruned: have the configuration say so. Returns the keys that changed, by section of `config.json`."""
    changed = changed_keys(model)
    for section, keys in changed.items():
        towers(model)[section][0].update(keys)
    return changed
