"""What happens to rows between products: norm, gate and rotation. One pass of our kernels each, or torch's several."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [rows, width] over its root mean square, times weight [width]."""
    if native := _kernels(x):
        return kernels.rms_norm(native, x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of both side by side: [rows, 2 * width] to [rows, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if (native := _kernels(gate_up)) and gate_up.stride(-1) == 1:
        return kernels.swish(native, gate, up, 1.0)
    return F.silu(gate).mul_(up)


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), CLIP's."""
    if (native := _kernels(x)) and x.dim() == 2 and x.stride(-1) == 1:
        return kernels.swish(native, x, None, 1.702)
    return (x * 1.702).sigmoid_().mul_(x)  # one temporary instead of three


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [rows, heads, dim] by cos and sin [rows, 1, dim / 2] (halves, as in LLaMA)."""
    if (native := _kernels(x)) and x.stride()[1:] == (x.shape[-1], 1) and len(cos) == len(x):
        return kernels.apply_rope(native, x, cos, sin)
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def _kernels(x: Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, if they take these rows: bfloat16 on a CPU, and no gradient asked for."""
    plain = x.dtype == torch.bfloat16 and x.device.type == "cpu" and not x.requires_grad
    return kernels.library() if plain else None
