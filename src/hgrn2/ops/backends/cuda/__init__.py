"""Scans as CUDA C++ kernels for Hopper and head width 128, compiled on first use by NVRTC."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hgrn2.ops.backends.base import Backend, find
from hgrn2.ops.backends.cuda.plan import WIDTH, coarse_chunks, kept_shape
from hgrn2.ops.call import CallTraits, ScanCall
from hgrn2.ops.gates import activate
from hgrn2.ops.tracing import constant_in_traces

DTYPES = (torch.bfloat16, torch.float16)
CAPABILITY = (9, 0)
# limit of the third dimension of a grid
MAX_SEQUENCES = (1 << 16) - 1
_device_problems: dict[int, str | None] = {}


class CudaBackend(Backend):
    """The CUDA kernels. Triton runs the steps, and the backward pass of float16, whose range is too small for them."""

    name = "cuda"
    opaque = ("scan", "step")

    def rejects(self, traits: CallTraits) -> str | None:
        """Return why the kernels cannot take such a call, or None."""
        device = traits.device
        if device.type != "cuda" or torch.version.cuda is None:
            return f"the inputs are on {device.type}, and its kernels need an NVIDIA GPU"
        dtype, k_width, v_width = traits.dtype, traits.k_width, traits.v_width
        if dtype not in DTYPES:
            return f"its kernels do not take {dtype}"
        if (k_width, v_width) != (WIDTH, WIDTH):
            return f"K is {k_width} and V {v_width}, and its kernels are for {WIDTH}"
        if not traits.is_tied or traits.is_step or traits.batch > MAX_SEQUENCES:
            return f"its kernels take no untied key, no step, and fewer than {MAX_SEQUENCES + 1:,} sequences"
        problem = self.device_problem(device.index or 0)
        if problem is None and dtype == torch.float16:
            problem = find("triton").rejects(traits)
        return problem

    def device_problem(self, index: int) -> str | None:
        """Return why nothing can be compiled for a device, or None.

        Args:
            index: index of the device.
        """
        return _device_problem(index)

    def step_backend(self, traits: CallTraits) -> str:
        """Return "triton", or "chunked" on a GPU without it."""
        triton: Any = find("triton")
        return "chunked" if traits.device.type == "cuda" and triton.problem else "triton"

    def plan(self, call: ScanCall, needs_grad: bool) -> tuple[ScanCall, int]:
        """Return the call with its values activated, and the number of chunks between saved states."""
        settings = call.settings
        if settings.v_activation != "none":
            # rounded as every product of the kernels would round it
            v = activate(call.v, settings.v_activation)
            call = call._replace(v=v, settings=settings._replace(v_activation="none"))
        if not needs_grad or call.q.dtype != torch.bfloat16:
            return call, 0
        batch, length, heads, _ = call.q.shape
        return call, coarse_chunks(batch, length, heads, call.num_packed())

    def kept_shape(self, call: ScanCall, plan: int) -> tuple[int, ...]:
        """Return the shape of the states that the forward pass keeps."""
        return kept_shape(call, plan)

    # set on first use, which loads the compiler; from then on a call goes directly to launch.py

    @cached_property
    def forward(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call `launch.forward`."""
        from hgrn2.ops.backends.cuda import launch

        return launch.forward

    @cached_property
    def backward(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call `launch.backward`."""
        from hgrn2.ops.backends.cuda import launch

        return launch.backward

    def step(self, call: ScanCall, in_place: bool) -> tuple[Tensor, Tensor]:
        """Run Triton's step."""
        return find("triton").step(call, in_place)


@constant_in_traces
def _device_problem(index: int) -> str | None:
    if index not in _device_problems:
        from hgrn2.ops.backends.cuda import compiler

        if torch.cuda.get_device_capability(index) != CAPABILITY:
            wanted = ".".join(map(str, CAPABILITY))
            _device_problems[index] = f"its kernels are for devices of compute capability {wanted}"
        else:
            _device_problems[index] = compiler.problem()
    return _device_problems[index]
