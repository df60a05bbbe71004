"""The scan by way of the CUDA kernels: the tensors of a call, made ready for them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hgrn2.ops.backends.base import find
from hgrn2.ops.backends.cuda.compiler import current_stream
from hgrn2.ops.backends.cuda.plan import kept_shape
from hgrn2.ops.backends.cuda.recipe import NOWHERE, Recipe
from hgrn2.ops.backends.cuda.recipes import LaunchKey, backward_recipe, forward_recipe
from hgrn2.ops.call import ScanCall, ScanGradients
from hgrn2.ops.device import on_device

# between the tokens of an input: backward.cu counts bytes across four of them in 32 bits
MOST_ROW_BYTES = 2**29


def forward(call: ScanCall, plan: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scan.

    Args:
        call: the call.
        plan: chunks between the states `backward` needs; 0 to keep none.

    Returns:
        y [B, T, H, V], the final state [N, H, K, V], float32, and states on the way [B, pieces, H, K, V], float32.
    """
    call = _aligned_call(call)
    y, final = _new_like(call.v), _new_states(call, call.initial_state)
    states = torch.empty(kept_shape(call, plan), dtype=torch.float32, device=call.q.device)
    if y.numel():
        run_recipe(
            forward_recipe(_key_of(call, plan)), call.q.device, q=call.q, f=call.f, v=call.v, bound=call.lower_bound,
            initial=call.initial_state, cu_seqlens=call.cu_seqlens, y=y, final=final, states=states,
        )  # fmt: skip
    return y, final, states


def backward(
    call: ScanCall, plan: int, kept: Tensor | None, dy: Tensor, d_final: Tensor | None, bound_wanted: bool
) -> ScanGradients:
    """Gradient of `forward`; arguments as for `Backend.backward`."""
    if not plan:
        # float16 has not the range for the kernels of this pass
        return find("triton").backward(call, 0, None, dy, d_final, bound_wanted)
    call, dy = _aligned_call(call), _aligned(dy)
    d_final = None if d_final is None else d_final.contiguous()
    dq, df, dv = (_new_like(x) for x in (call.q, call.f, call.v))
    d_initial = None if call.initial_state is None else _new_states(call, d_final)
    d_bound = torch.empty_like(call.lower_bound) if call.lower_bound is not None and bound_wanted else None
    if dq.numel():
        recipe = backward_recipe(_key_of(call, plan), dy.stride(), d_final is not None, d_bound is not None)
        run_recipe(
            recipe, call.q.device, q=call.q, f=call.f, v=call.v, bound=call.lower_bound, initial=call.initial_state,
            cu_seqlens=call.cu_seqlens, dy=dy, states=kept, d_final=d_final, dq=dq, df=df, dv=dv, d_bound=d_bound,
            d_initial=d_initial,
        )  # fmt: skip
    elif d_bound is not None:
        d_bound.zero_()
    return ScanGradients(dq, df, None, dv, d_bound, d_initial)


def run_recipe(recipe: Recipe, device: torch.device, **tensors: Tensor | None) -> None:
    """Launch all of a recipe on the device's current stream.

    Args:
        recipe: the launches.
        device: where the tensors are.
        **tensors: what `Place` calls by these names; None is nowhere.
    """
    with on_device(device):
        stream = current_stream(device)
        # held until all is launched; whoever gets the memory then comes later in the stream. Whole numbers, which
        # torch, where it fills fresh memory for tests, fills with bits that are not a number in any type
        rooms = {
            name: (torch.zeros if name == "zeros" else torch.empty)(size // 4, dtype=torch.int32, device=device)
            for name, size in recipe.sizes.items()
            if size
        }
        addresses = {name: 0 if x is None else x.data_ptr() for name, x in (tensors | rooms).items()}
        addresses[NOWHERE.tensor] = 0
        for kernel, grid, template, pointers, places in recipe.launches:
            # a copy, for another thread may run the same recipe
            arguments = type(template).from_buffer_copy(template)
            pointers.pack_into(arguments, 0, *[addresses[name] + offset for name, offset in places])
            kernel.launch(grid, arguments, stream)


def _aligned_call(call: ScanCall) -> ScanCall:
    """Return a call to be read 16 bytes at a time; what the kernels know no strides of is contiguous."""
    q, f, _, v, bound, state, cu_seqlens, settings = call
    bound = None if bound is None else _aligned(bound.contiguous())
    state, cu_seqlens = (None if x is None else x.contiguous() for x in (state, cu_seqlens))
    return ScanCall(_aligned(q), _aligned(f), None, _aligned(v), bound, state, cu_seqlens, settings)


def _key_of(call: ScanCall, coarse: int) -> LaunchKey:
    q, cu_seqlens = call.q, call.cu_seqlens
    packed = None if cu_seqlens is None else (cu_seqlens.shape[0] - 1, cu_seqlens.dtype == torch.int64)
    strides = (q.stride(), call.f.stride(), call.v.stride())
    has_bound, has_initial = call.lower_bound is not None, call.initial_state is not None
    return LaunchKey(q.shape, strides, q.dtype, q.device.index, has_bound, has_initial, packed, call.settings, coarse)


def _new_states(call: ScanCall, known: Tensor | None) -> Tensor:
    """Room for the states of all sequences; one that is packed and empty has the known one, or zeros."""
    make = torch.empty if call.cu_seqlens is None and call.q.numel() else torch.zeros
    states = make(call.state_shape(), dtype=torch.float32, device=call.q.device)
    return states if make is torch.empty or known is None else states.copy_(known)


def _aligned(x: Tensor) -> Tensor:
    """X itself if its rows can be read 16 bytes at a time, which those of a fused projection can; else a copy."""
    fits = x.data_ptr() % 16 == 0 and _can_be_read(x.stride(), x.element_size())
    # contiguous() would give back what is contiguous at a bad address
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache
def _can_be_read(strides: tuple[int, ...], element_size: int) -> bool:
    steps = [s * element_size for s in strides[:-1]]
    # [B, T, H, K]
    near = len(steps) != 3 or steps[1] < MOST_ROW_BYTES
    return strides[-1] == 1 and near and not any(step % 16 for step in steps)


def _new_like(x: Tensor) -> Tensor:
    """Room for a contiguous tensor."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
