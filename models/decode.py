"""A pass of few rows on the CPU in one native call: new tokens and small parts of prompts, through all layers and the head."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models import kernels
from models.kernels import thresholds
from models.kv_cache import RequestCache
from models.linear import Linear
from models.quantized import Int8Linear, Nf4Linear
from models.sparse import AnyLinear, PackedLinear

POINTER, COUNT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
FORMATS = {"dense": 0, "packed": 1, "int8": 2, "nf4": 3}
"""`Format` of kernels/decode.h."""


class Rows(Protocol):
    """One request's new rows: a `models.forward.SequenceInput`."""

    def __len__(self) -> int: ...
    @property
    def hidden(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def cache(self) -> RequestCache: ...
    @property
    def text_spans(self) -> tuple[tuple[int, int], ...] | None: ...
    @property
    def logits_to_keep(self) -> int: ...


class LayerWeights(Protocol):
    """As `models.llava.DecoderLayer`."""

    heads: int
    kv_heads: int
    input_norm: Tensor
    post_norm: Tensor

    def linears(self) -> dict[str, AnyLinear]: ...


class _Matrix(ctypes.Structure):
    """`Matrix` of kernels/decode.h; the structures below have their names there too."""

    _fields_ = [("weight", POINTER), ("bias", POINTER), ("inputs", COUNT), ("outputs", COUNT), ("format", COUNT)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", POINTER), ("post_norm", POINTER), ("qkv", _Matrix), ("out", _Matrix), ("gate_up", _Matrix),
        ("down", _Matrix), ("heads", COUNT), ("kv_heads", COUNT),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER), ("norm", POINTER), ("inv_freq", POINTER), ("head", _Matrix), ("num_layers", COUNT), ("width", COUNT),
        ("head_dim", COUNT), ("avx512", COUNT), ("bf16", COUNT), ("eps", FLOAT), ("rope_scaling", FLOAT),
    ]  # fmt: skip


class _Request(ctypes.Structure):
    _fields_ = [
        ("hidden", POINTER), ("bias", POINTER), ("slabs", POINTER), ("capacity", POINTER), ("lengths", POINTER),
        ("positions", POINTER), ("rows", COUNT), ("logits", COUNT),
    ]  # fmt: skip


@dataclass(frozen=True)
class DecodePlan:
    """Where the weights of a model lie, for `kernels/decode.cpp`. `instructions` say what multiplies them, for people."""

    native: ctypes.CDLL
    model: _Model
    dtype: torch.dtype
    instructions: str
    max_rows: int
    """More run faster layer by layer."""
    held: tuple[object, ...]  # what the pointers point into

    @classmethod
    def of(
        cls, layers: Sequence[LayerWeights], norm: Tensor, head: AnyLinear, inv_freq: Tensor, rope_scaling: float, head_dim: int,
        eps: float,
    ) -> DecodePlan | None:  # fmt: skip
        """None for weights on another device, of other types or in other formats than the native step takes, and where it is not
        built: the caller then runs layer by layer."""
        native, avx512 = kernels.decoding_library(), kernels.library() is not None
        matrices = [matrix for layer in layers for matrix in layer.linears().values()] + [head]
        norms = [norm, *(weight for layer in layers for weight in (layer.input_norm, layer.post_norm))]
        if native is None or norm.dtype not in (torch.float32, torch.bfloat16) or head_dim % 2:
            return None
        if not all(_takes(matrix, norm.dtype, avx512) for matrix in matrices) or not all(_plain(w, norm.dtype) for w in norms):
            return None
        held: list[object] = [*matrices, *norms, inv_freq]

        def point(matrix: AnyLinear) -> _Matrix:
            bias = None if matrix.bias is None else matrix.bias.data_ptr()
            if isinstance(matrix, Linear):
                outputs, inputs = matrix.weight.shape
                return _Matrix(matrix.weight.data_ptr(), bias, inputs, outputs, FORMATS["dense"])
            assert isinstance(matrix, PackedLinear | Int8Linear | Nf4Linear)
            held.append(table := matrix.native_table())
            return _Matrix(ctypes.addressof(table), bias, matrix.inputs, matrix.outputs, FORMATS[matrix.format])

        table = (_Layer * len(layers))(*(
            _Layer(
                layer.input_norm.data_ptr(), layer.post_norm.data_ptr(), *map(point, layer.linears().values()), layer.heads,
                layer.kv_heads,
            )
            for layer in layers
        ))  # fmt: skip
        model = _Model(
            ctypes.addressof(table), norm.data_ptr(), inv_freq.data_ptr(), point(head), len(layers), len(norm), head_dim, avx512,
            norm.dtype == torch.bfloat16, eps, rope_scaling,
        )  # fmt: skip
        int8 = any(isinstance(matrix, Int8Linear) for matrix in matrices)
        max_rows = thresholds.decode_rows(len(norm), kernels.many_rows() if avx512 else "portable", int8=int8)
        return cls(native, model, norm.dtype, "AVX-512" if avx512 else "portable", max_rows, (table, *held))

    def takes(self, batch: Sequence[Rows]) -> bool:
        """Whether this is faster than layer by layer."""
        few = sum(map(len, batch)) <= self.max_rows
        return few and all(one.text_spans is None and one.hidden.dtype == self.dtype for one in batch)

    def step(self, batch: Sequence[Rows]) -> Tensor:
        """float32 logits [sum of logits_to_keep, vocab]. Keys and values are appended to each request's cache.

        Raises RuntimeError for a cache without room. Each request's result is the same bit for bit whatever stands beside it.
        """
        inputs = [(one.hidden.contiguous(), one.positions.contiguous(), one.cache.append_rows(len(one))) for one in batch]
        requests = (_Request * len(batch))(*(
            _Request(
                hidden.data_ptr(), one.cache.bias_pointer, ctypes.addressof(one.cache.slab_pointers),
                ctypes.addressof(one.cache.slab_rows), ctypes.addressof(before), positions.data_ptr(), len(one), one.logits_to_keep,
            )
            for one, (hidden, positions, before) in zip(batch, inputs, strict=True)
        ))  # fmt: skip
        # Its type is said: loading another checkpoint changes the default one for all threads meanwhile.
        logits = torch.empty(sum(one.logits_to_keep for one in batch), self.model.head.outputs, dtype=torch.float32)
        self.native.run_few_rows(ctypes.byref(self.model), requests, len(batch), logits.data_ptr(), torch.get_num_threads())
        return logits


def _takes(matrix: AnyLinear, dtype: torch.dtype, avx512: bool) -> bool:
    if matrix.bias is not None and not _plain(matrix.bias, dtype):
        return False
    if isinstance(matrix, PackedLinear):
        return avx512 and dtype == torch.bfloat16
    if isinstance(matrix, Nf4Linear):
        return avx512 and dtype == torch.bfloat16 and matrix.native
    if isinstance(matrix, Int8Linear):
        return avx512 and kernels.few_bits_library() is not None and _plain(matrix.codes, torch.int8)
    return isinstance(matrix, Linear) and _plain(matrix.weight, dtype)


def _plain(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.device.type == "cpu" and weight.dtype == dtype and weight.is_contiguous()
