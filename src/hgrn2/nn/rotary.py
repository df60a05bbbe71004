"""Rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

from hgrn2.ops.export import is_exporting
from hgrn2.ops.transforms import map_by_loop


def rotate_halves(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotate the halves of x by position * theta^(-2 i / size).

    Args:
        x: [B, T, heads, size].
        position: [B, T] or [1, T], integers.
        theta: base.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.unsqueeze(2) for part in rotary_angles(position, half, theta, dtype))
    a, b = x[..., :half].to(dtype), x[..., half:].to(dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def rotary_angles(position: Tensor, half: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of position * theta^(-i / half).

    Args:
        position: [...], integers.
        half: half the width of a head.
        theta: base.
        dtype: dtype of the angles, float32 or wider.

    Returns:
        cos and sin, [..., half].
    """
    if torch.compiler.is_compiling() and position.is_cuda and not is_exporting():
        # opaque, or a compiled program computes a power, a cosine and a sine again for every head and pass
        cos, sin = _angles_op(position, half, theta, dtype).unbind(0)
        return cos, sin
    angle = _angles(position, half, theta, dtype)
    return angle.cos(), angle.sin()


def _angles(position: Tensor, half: int, theta: float, dtype: torch.dtype) -> Tensor:
    exponent = torch.arange(half, device=position.device, dtype=dtype) / half
    return position.unsqueeze(-1).to(dtype) * theta**-exponent


@torch.library.custom_op("hgrn2::rotary_angles", mutates_args=())
def _angles_op(position: Tensor, half: int, theta: float, dtype: torch.dtype) -> Tensor:
    angle = _angles(position, half, theta, dtype)
    return torch.stack([angle.cos(), angle.sin()])


@_angles_op.register_fake
def _(position: Tensor, half: int, theta: float, dtype: torch.dtype) -> Tensor:
    return position.new_empty((2, *position.shape, half), dtype=dtype)


map_by_loop(_angles_op)
