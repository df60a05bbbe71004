"""Scans and steps as Triton kernels, for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from hgrn2.ops.backends.base import Backend, Unavailable
from hgrn2.ops.call import CallTraits
from hgrn2.ops.triton.installed import DTYPES, IS_INTERPRETED, PROBLEM

# least width for matrix units, and the largest K that fits a multiprocessor; columns of V do not depend on each other
NARROWEST, WIDEST_K, WIDEST_V = 16, 256, 1024


class TritonBackend(Backend):
    """The Triton kernels.

    Args:
        problem: why Triton cannot be used, or None.
        is_interpreted: whether Triton's interpreter runs the kernels, on the CPU too.
    """

    name = "triton"
    opaque = ("scan", "step")

    def __init__(self, problem: str | None = PROBLEM, is_interpreted: bool = IS_INTERPRETED):
        self.problem = None if problem is None else Unavailable(problem)
        self.is_interpreted = is_interpreted

    def rejects(self, traits: CallTraits) -> str | None:
        """Return why the kernels cannot take such a call, or None."""
        device = traits.device
        if device.type != "cuda" and not (self.is_interpreted and device.type == "cpu"):
            return f"the inputs are on {device.type}, and its kernels need a GPU"
        dtype, k_width, v_width = traits.dtype, traits.k_width, traits.v_width
        if torch.version.hip:
            return "its kernels are for NVIDIA GPUs"
        if dtype not in DTYPES:
            return f"its kernels do not take {dtype}"
        if min(k_width, v_width) < NARROWEST or k_width > WIDEST_K or v_width > WIDEST_V:
            limits = f"{NARROWEST} to {WIDEST_K} and {WIDEST_V}"
            return f"K is {k_width} and V {v_width}, and its kernels take {limits}"
        return self.problem

    # set on first use, which imports Triton; from then on a call goes directly to launch.py

    @cached_property
    def forward(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call `launch.forward`."""
        from hgrn2.ops.backends.triton import launch

        return launch.forward

    @cached_property
    def backward(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call `launch.backward`."""
        from hgrn2.ops.backends.triton import launch

        return launch.backward

    @cached_property
    def step(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call `launch.step`."""
        from hgrn2.ops.backends.triton import launch

        return launch.step
