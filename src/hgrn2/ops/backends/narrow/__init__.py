"""Scans of heads of at most 16 channels as Triton kernels, for NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from hgrn2.ops.backends.base import Backend, Unavailable
from hgrn2.ops.backends.narrow.tiles import BACKWARD, blocks_for, kept_shape, takes
from hgrn2.ops.call import CallTraits, ScanCall
from hgrn2.ops.triton.installed import DTYPES, IS_INTERPRETED, PROBLEM


class NarrowBackend(Backend):
    """Kernels for narrow heads, which go from token to token in registers. Steps are those of "chunked".

    Args:
        problem: why Triton cannot be used, or None.
        is_interpreted: whether Triton's interpreter runs the kernels, on the CPU too.
    """

    name = "narrow"

    def __init__(self, problem: str | None = PROBLEM, is_interpreted: bool = IS_INTERPRETED):
        self.problem = None if problem is None else Unavailable(problem)
        self.is_interpreted = is_interpreted

    def rejects(self, traits: CallTraits) -> str | None:
        """Return why the kernels cannot take such a call, or None."""
        device = traits.device
        if device.type != "cuda" and not (self.is_interpreted and device.type == "cpu"):
            return f"the inputs are on {device.type}, and its kernels need a GPU"
        if torch.version.hip:
            return "its kernels are for NVIDIA GPUs"
        if traits.is_step:
            return "its kernels take no step"
        return takes(traits.dtype, traits.k_width, traits.v_width, DTYPES) or self.problem

    def step_backend(self, traits: CallTraits) -> str:
        """Return "chunked"."""
        return "chunked"

    def plan(self, call: ScanCall, needs_grad: bool) -> tuple[ScanCall, int]:
        """Return the call and the tokens between the states that are kept, 0 for none."""
        return call, blocks_for(BACKWARD, call.q.shape[-1], call.v.shape[-1]).tokens if needs_grad else 0

    def kept_shape(self, call: ScanCall, plan: int) -> tuple[int, ...]:
        """Return the shape of the states that the forward pass keeps."""
        return kept_shape(call, plan)

    # set on first use, which imports Triton; from then on a call goes directly to launch.py

    @cached_property
    def forward(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call `launch.forward`."""
        from hgrn2.ops.backends.narrow import launch

        return launch.forward

    @cached_property
    def backward(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call `launch.backward`."""
        from hgrn2.ops.backends.narrow import launch

        return launch.backward

    def step(self, call: ScanCall, in_place: bool) -> Any:
        """Fail: `step_backend` names another backend."""
        raise AssertionError("the narrow kernels take no step")
