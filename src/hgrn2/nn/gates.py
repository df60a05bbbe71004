"""Compute the layer-wise lower bounds of the forget gates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hgrn2.shapes import LD

LOWER_BOUNDS = ("inclusive", "exclusive")
# the largest float32 below 1: a bound of exactly 1 would freeze the state
_BELOW_ONE = 1 - 2**-24


def lower_bounds(gamma: LD, kind: str) -> LD:
    """Compute lower bounds that increase with depth from unconstrained parameters (arXiv 2311.04823, section 3.2).

    With P = softmax of gamma over the layers, layer l's bound is

    * "exclusive": P_0 + ... + P_{l-1}, as the papers write it;
    * "inclusive": P_1 + ... + P_l, as the published language models compute it.

    Both are 0 in the first layer, and l / L if gamma is uniform.

    Args:
        gamma: [L, D].
        kind: "inclusive" or "exclusive".

    Returns:
        [L, D], float32 (float64 for float64), in [0, 1), non-decreasing over the layers.
    """
    p = torch.softmax(gamma.to(torch.promote_types(gamma.dtype, torch.float32)), dim=0)
    # sum only the terms of the bound: a difference of sums could be negative
    summed = torch.cumsum(p[1:] if kind == "inclusive" else p[:-1], dim=0)
    return torch.cat([torch.zeros_like(p[:1]), summed]).clamp(max=_BELOW_ONE)


def set_initial_bounds(gamma: LD, kind: str, top: float | None) -> None:
    """Set the parameters of the bounds to their initial values, in place.

    Args:
        gamma: [L, D].
        kind: "inclusive" or "exclusive".
        top: bound of the last layer, in (0, 1); those of the layers below rise from 0 in equal steps. None means
            (L - 1) / L, for which gamma is 0.
    """
    with torch.no_grad():
        gamma.zero_()
        others = len(gamma) - 1
        if top is not None and others:
            # the share that no bound contains
            free = 0 if kind == "inclusive" else others
            gamma[free] = math.log((1 - top) * others / top)


def bounds_of_layers(gamma: Tensor, kind: str, recurrent: Sequence[int], *, detach_first: bool = True) -> list[Tensor]:
    """Return the lower bound of each layer, the rows of `lower_bounds`.

    The first row is 0 for every gamma, so it is detached to save its gradient. If no later layer uses its bound, the
    first row stays attached: DistributedDataParallel needs a gradient of every parameter, and this one is zero.

    Args:
        gamma: [L, D].
        kind: "inclusive" or "exclusive".
        recurrent: indices of the layers that use their bound.
        detach_first: False keeps the first row attached, so that one compiled block fits every layer. The gradients
            are bitwise the same.
    """
    bounds = list(lower_bounds(gamma, kind).unbind(0))
    if detach_first and any(layer > 0 for layer in recurrent):
        bounds[0] = bounds[0].detach()
    return bounds


def touch_unused_bounds(x: Tensor, bounds: Sequence[Tensor | None], recurrent: Sequence[int]) -> Tensor:
    """Return x [B, T, D] unchanged; if no layer uses the bounds, connect them so that their gradient is zero.

    DistributedDataParallel fails at the second step if a parameter has no gradient.

    Args:
        x: input of the first layer.
        bounds: from `bounds_of_layers`; the first row is 0.
        recurrent: indices of the layers that use their bound.
    """
    first = bounds[0]
    return x if recurrent or first is None else x + first.to(x.dtype)
