"""What safetensors files say of their tensors before any is read: names, shapes and dtypes, in milliseconds at any size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from torch import Tensor

BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""By safetensors' names; the others have one byte."""


class TensorHeader(NamedTuple):
    """`dtype` is safetensors' name for it: F32, BF16, U8 and so on."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def is_float(self) -> bool:
        return "F" in self.dtype

    def nbytes(self, float_bytes: int | None = None) -> int:
        """As saved, or with floating-point numbers of another size."""
        saved = BYTES.get(self.dtype, 1)
        return self.elements * (float_bytes if float_bytes and self.is_float else saved)


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """The tensors of whole safetensors files by name."""
    found = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():
                part = file.get_slice(key)
                found[key] = TensorHeader(part.get_dtype(), tuple(part.get_shape()))
    return found


def first_misfit(expected: Mapping[str, Tensor], found: Mapping[str, TensorHeader]) -> str | None:
    """A tensor that a file has in another shape than is expected, and both shapes. Quantized ones may have any."""
    for name, tensor in expected.items():
        header = found.get(name)
        if header and header.is_float and header.shape != tuple(tensor.shape):
            return f"{name} is {_by(header.shape)} and not {_by(tensor.shape)}"
    return None


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"
