"""y = x W^T + b with a weight of 8 or 4 bits, as bitsandbytes (the extra `quant`) has them; and checkpoints that hold such weights.

CPUs with AVX-512 multiply them by our own kernels, other devices by the library's products. Its modules are not used: on some CPUs
`Linear4bit` repacks its weight in place when it first multiplies, and `.to()` does not undo that. Here a weight is brought into the
form of its device once, when it is made.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from models import kernels
from models.errors import CheckpointError
from models.linear import Linear, kernels_take

OUTLIER = 6.0
"""Magnitude from which an input is not rounded to 8 bits (LLM.int8(), section 3.2)."""
BLOCK = 64
"""Weights that share a scale in NF4, as in QLoRA."""


@cache
def bitsandbytes() -> ModuleType:
    """The library. Raises CheckpointError where it is not installed."""
    told, package = logging.getLogger("bitsandbytes"), sys.modules.get("kernels")
    before = told.level
    told.setLevel(logging.ERROR)
    # Where the package `kernels` is installed it would fetch a product from the hub; it has one of its own.
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes
        import bitsandbytes.functional
    except ImportError as error:
        raise CheckpointError("quantized weights need bitsandbytes; install it with `pip install -e '.[quant]'`") from error
    finally:
        told.setLevel(before)
        del sys.modules["kernels"]
        if package is not None:
            sys.modules["kernels"] = package
    found: ModuleType = bitsandbytes
    return found


@dataclass
class Int8Linear:
    """A weight as 8-bit integers, and a scale for each output: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).

    codes [out, in] int8; scales [out] float32, the magnitude of code 127. Inputs are rounded to 8 bits row by row but for outliers,
    which meet the weight unrounded. A column counts as one in the rows where its value is large; in the paper it does in all rows,
    and a request's answer would depend on its batch.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None = None
    format: ClassVar = "int8"

    @classmethod
    def of(cls, linear: Linear) -> Int8Linear:
        weight = linear.weight.detach().half().float()  # the library reads 16 bits
        scales = weight.abs().amax(1)
        # A row of zeros, as structured or high sparsity leaves, has no scale: zero times 127 / 0 is no number.
        codes = (weight * (127 / scales.where(scales > 0, 1.0))[:, None]).round().to(torch.int8)
        return cls(codes, scales, linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if not len(rows):
            return x.new_empty(*x.shape[:-1], len(self.codes))
        if native := self._native(rows):
            return kernels.int8_linear(native, rows, self.native_table(), self.outputs, self.bias).view(*x.shape[:-1], -1)
        library = bitsandbytes()
        outlier = rows.abs() >= OUTLIER
        rounded, row_scales, _ = library.functional.int8_vectorwise_quant(rows.masked_fill(outlier, 0).half())
        product = torch.ops.bitsandbytes.int8_scaled_mm.default
        out: Tensor = product(rounded, self.codes, row_scales, self.scales, bias=self.bias, dtype=x.dtype)
        columns = outlier.any(0).nonzero()[:, 0]
        if len(columns):
            weight = (self.codes[:, columns] * (self.scales[:, None] / 127)).to(x.dtype)
            out += rows.where(outlier, 0)[:, columns] @ weight.T
        return out.view(*x.shape[:-1], -1)

    def unrounded(self, x: Tensor) -> Tensor:
        """The same in float32, its sums not rounded to the dtype of `x` on a CPU."""
        return self(x.float()) if x.device.type == "cpu" else self(x).float()

    def _native(self, rows: Tensor) -> ctypes.CDLL | None:
        """The CPU kernels, if they take such rows."""
        if rows.device.type != "cpu" or rows.dtype not in (torch.bfloat16, torch.float32) or rows.requires_grad:
            return None
        return kernels.few_bits_library() if self.bias is None or self.bias.dtype == rows.dtype else None

    def native_table(self) -> kernels.Int8Weight:
        """Where the parts lie, as the kernels take it; it does not keep them alive."""
        return kernels.Int8Weight(self.codes.data_ptr(), self.scales.data_ptr(), self._sums.data_ptr(), OUTLIER)

    @cached_property
    def _sums(self) -> Tensor:
        """Of each output's codes."""
        return self.codes.sum(1, dtype=torch.int32)

    def rows(self, ids: Tensor) -> Tensor:
        """The weights of these outputs, float32 [*ids, in]: what an embedding is asked for."""
        return self.codes[ids] * (self.scales[ids][..., None] / 127)

    @property
    def outputs(self) -> int:
        return len(self.codes)

    @property
    def inputs(self) -> int:
        return self.codes.shape[1]

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.scales, self.bias) if t is not None)

    @property
    def size(self) -> int:
        return self.codes.numel()

    @property
    def nonzeros(self) -> int:
        return int(self.codes.count_nonzero())


@dataclass
class Nf4Linear:
    """A weight in 4-bit NormalFloat: for every BLOCK weights a scale, and one of 16 values for each (QLoRA, Dettmers et al. 2023,
    arXiv 2305.14314).

    codes [out * in / 2] uint8; `state` is bitsandbytes' QuantState. One of the 16 values is zero, so that zeros stay, and small
    weights become zeros too: `nonzeros` are counted afterwards. If `native`, codes are [out, in / BLOCK, BLOCK / 2], of the first
    half of a block in the lower halves of bytes, as the CPU kernels take them.
    """

    codes: Tensor
    state: Any
    nonzeros: int
    bias: Tensor | None = None
    native: bool = False
    format: ClassVar = "nf4"

    @classmethod
    def of(cls, linear: Linear) -> Nf4Linear:
        functional, weight = bitsandbytes().functional, linear.weight.detach().contiguous()
        codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        nonzeros = int(dequantize_4bit(codes, state, weight.dtype).count_nonzero())
        native = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.shape[1] % BLOCK == 0
        if native and kernels.few_bits_library():
            each = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1)
            first, second = each.view(len(weight), -1, 2, BLOCK // 2).unbind(2)
            return cls(first | second << 4, state, nonzeros, linear.bias, native=True)
        return cls(codes, state, nonzeros, linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self.native:
            return self._native_product(x)
        if self.state.shape[1] % BLOCK:
            return F.linear(x, dequantize_4bit(self.codes, self.state, x.dtype), self.bias)
        out: Tensor = bitsandbytes().matmul_4bit(x, self.codes, quant_state=self.state, bias=self.bias)
        return out

    def _native_product(self, x: Tensor) -> Tensor:
        native, rows = kernels.few_bits_library(), x.flatten(0, -2)
        assert native is not None, "asked before the codes were laid out for it"
        if kernels_take(rows, "nf4"):
            return kernels.nf4_linear(native, rows, self.native_table(), self.outputs, self.bias).view(*x.shape[:-1], -1)
        return F.linear(x, kernels.decompress_nf4(native, self.native_table(), self.outputs, self.inputs).to(x.dtype), self.bias)

    def native_table(self) -> kernels.Nf4Weight:
        """Where the parts lie, as the kernels take it; it does not keep them alive."""
        state = self.state
        return kernels.Nf4Weight(self.codes.data_ptr(), state.absmax.data_ptr(), state.code.data_ptr(), self.inputs)

    @property
    def outputs(self) -> int:
        return int(self.state.shape[0])

    @property
    def inputs(self) -> int:
        return int(self.state.shape[1])

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.codes, self.state.absmax, self.state.code, self.bias) if t is not None)

    @property
    def size(self) -> int:
        return int(self.state.shape.numel())


def dequantize_4bit(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The weight [out, in], as one long row: the library's CPU kernel gives values of other blocks their scales where a row is no
    multiple of a block, as 4,304 in SigLIP and 688 in `embedded` are not."""
    flat = copy(state)
    flat.shape, flat.dtype = torch.Size((1, state.shape.numel())), dtype
    dense: Tensor = bitsandbytes().functional.dequantize_4bit(codes, flat)
    return dense.view(state.shape)


def nf4_values(device: torch.device | str) -> Tensor:
    """The 16 values that a weight can have, in units of its block's scale: float32, ascending, -1 and 1 at the ends."""
    values: Tensor = bitsandbytes().functional.get_4bit_type("nf4", device=device)
    return values


def multiplied_natively(kind: str, device: str, dtype: torch.dtype | None) -> bool:
    """Whether our kernels alone make and multiply such weights: bitsandbytes then need not be there."""
    takes = kind == "int8" and device == "cpu" and dtype in (torch.bfloat16, torch.float32)
    return takes and kernels.few_bits_library() is not None


QUANTIZED: dict[str, type[Int8Linear] | type[Nf4Linear]] = {"int8": Int8Linear, "nf4": Nf4Linear}
"""The formats, by the name that `--quantization` takes."""


# ---- checkpoints that hold such weights


def quantization_of(config: Any) -> str | None:
    """The format of a checkpoint's weights, by `quantization_config` in its configuration. Raises CheckpointError for another one
    than ours."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    about = found if isinstance(found, dict) else found.to_dict()
    if about.get("quant_method") == "compressed-tensors":
        _take_as_dense(config, about)
        return None
    if about.get("quant_method") != "bitsandbytes":
        raise CheckpointError(
            f"config.json: quantization_config.quant_method {about.get('quant_method')!r} is not supported; bitsandbytes is"
        )
    if about.get("load_in_8bit"):
        return "int8"
    if (kind := about.get("bnb_4bit_quant_type", "fp4")) != "nf4":
        raise CheckpointError(f"config.json: bnb_4bit_quant_type {kind!r} is not supported; nf4 is")
    return "nf4"


def _take_as_dense(config: Any, about: dict[str, Any]) -> None:
    """llm-compressor says in this place too that weights were pruned. Plain zeros need nothing; what was packed is refused."""
    sparse = about.get("sparsity_config") or {}
    formats = {about.get("format", "dense"), sparse.get("format", "dense")}
    if formats != {"dense"} or about.get("config_groups"):
        packed = ", ".join(sorted(formats - {"dense"})) or "quantized"
        raise CheckpointError(f"config.json: weights are compressed ({packed}); save them with save_compressed=False")
    del config.quantization_config


SAMPLED_ROWS = 64
"""Of a matrix, that are quantized again to see whether it was quantized."""


def read_dense(shards: Sequence[Path], dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a quantized checkpoint, by the files' names, its matrices dense in `dtype`.

    Quantized again they are what they were: the scales are the largest magnitudes, which have a code of their own. Raises
    CheckpointError for a matrix whose scales are not there.
    """
    held: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(shard, "pt") as file:
            held |= {key: file.get_tensor(key) for key in file.keys()}
    quantized = {key for key in held if key.endswith(".weight") and held[key].dtype in (torch.int8, torch.uint8)}
    dense = {}
    for key in sorted(quantized):
        beside = {name: held.pop(name) for name in [*held] if name.startswith(f"{key}.") or name == f"{key[: -len('weight')]}SCB"}
        held.pop(f"{key}_format", None)
        try:
            dense[key] = _dense(held.pop(key), beside, key).to(dtype)
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{shards[0].parent}: {key} is quantized and its scales are missing: {error}") from error
    return held | dense


def was_quantized(weight: Tensor, kind: str) -> bool:
    """Whether a dense weight [out, in] is what `read_dense` made of a quantized one: quantized again, some of its rows are the same
    but for the dtype's rounding."""
    step = 1 if weight.shape[1] % BLOCK else max(1, len(weight) // SAMPLED_ROWS)
    rows = weight.detach()[::step].contiguous()
    if kind == "int8":
        again = Int8Linear.of(Linear(rows)).rows(torch.arange(len(rows), device=rows.device))
    else:
        codes, state = bitsandbytes().functional.quantize_4bit(rows, blocksize=BLOCK, quant_type="nf4")
        again = dequantize_4bit(codes, state, torch.float32)
    return torch.allclose(again, rows.float(), rtol=2**-6, atol=0)


def _dense(codes: Tensor, beside: dict[str, Tensor], key: str) -> Tensor:
    if codes.dtype == torch.int8:
        return codes * (beside[f"{key[: -len('weight')]}SCB"].float()[:, None] / 127)
    functional = bitsandbytes().functional
    state = functional.QuantState.from_dict({name.removeprefix(f"{key}."): value for name, value in beside.items()}, codes.device)
    return dequantize_4bit(codes, state, torch.float32)


def stored_nf4(key: str, weight: Tensor) -> dict[str, Tensor]:
    """A matrix [out, in] as bitsandbytes' modules save it, by the files' names."""
    codes, state = bitsandbytes().functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return {key: codes} | {f"{key}.{name}": value for name, value in state.as_dict(packed=True).items()}


def nf4_config(dtype: torch.dtype, skipped: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of such files: products in `dtype`, and all matrices but those of the modules `skipped`."""
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."), "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": list(skipped),
    }  # fmt: skip
