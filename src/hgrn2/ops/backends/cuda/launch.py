"""Forward and backward pass: prepare the tensors of a call and launch the CUDA kernels on them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hgrn2.ops.backends.base import find
from hgrn2.ops.backends.cuda.compiler import current_stream
from hgrn2.ops.backends.cuda.launch_list import NULL, LaunchList
from hgrn2.ops.backends.cuda.plan import kept_shape
from hgrn2.ops.backends.cuda.schedule import LaunchKey, backward_launches, forward_launches
from hgrn2.ops.call import ScanCall, ScanGradients
from hgrn2.ops.device import on_device
from hgrn2.shapes import BTHV, NHKV

# largest stride between tokens: backward.cu keeps the byte offset of four tokens in 32 bits
MAX_ROW_BYTES = 2**29


def forward(call: ScanCall, plan: int) -> tuple[BTHV, NHKV, Tensor]:
    """Run a scan.

    Args:
        call: the call.
        plan: number of chunks between saved states, which `backward` needs; 0 to save none.

    Returns:
        y [B, T, H, V], the final state [N, H, K, V], float32, and intermediate states [B, pieces, H, K, V], float32.
    """
    call = _aligned_call(call)
    y, final = _new_like(call.v), _new_states(call, call.initial_state)
    states = torch.empty(kept_shape(call, plan), dtype=torch.float32, device=call.q.device)
    if y.numel():
        run_launches(
            forward_launches(_key_of(call, plan)), call.q.device, q=call.q, f=call.f, v=call.v, bound=call.lower_bound,
            initial=call.initial_state, cu_seqlens=call.cu_seqlens, y=y, final=final, states=states,
        )  # fmt: skip
    return y, final, states


def backward(
    call: ScanCall, plan: int, kept: Tensor | None, dy: BTHV, d_final: NHKV | None, bound_wanted: bool
) -> ScanGradients:
    """Compute the gradient of `forward`; arguments of `Backend.backward`."""
    if not plan:
        # float16's range is too small for the backward kernels
        return find("triton").backward(call, 0, None, dy, d_final, bound_wanted)
    call, dy = _aligned_call(call), _aligned(dy)
    d_final = None if d_final is None else d_final.contiguous()
    dq, df, dv = (_new_like(x) for x in (call.q, call.f, call.v))
    d_initial = None if call.initial_state is None else _new_states(call, d_final)
    d_bound = torch.empty_like(call.lower_bound) if call.lower_bound is not None and bound_wanted else None
    if dq.numel():
        launches = backward_launches(_key_of(call, plan), dy.stride(), d_final is not None, d_bound is not None)
        run_launches(
            launches, call.q.device, q=call.q, f=call.f, v=call.v, bound=call.lower_bound, initial=call.initial_state,
            cu_seqlens=call.cu_seqlens, dy=dy, states=kept, d_final=d_final, dq=dq, df=df, dv=dv, d_bound=d_bound,
            d_initial=d_initial,
        )  # fmt: skip
    elif d_bound is not None:
        d_bound.zero_()
    return ScanGradients(dq, df, None, dv, d_bound, d_initial)


def run_launches(launches: LaunchList, device: torch.device, **tensors: Tensor | None) -> None:
    """Run launches on the device's current stream.

    Args:
        launches: the launches.
        device: device of the tensors.
        **tensors: tensors by the names in `BufferRef`; None is a null pointer.
    """
    with on_device(device):
        stream = current_stream(device)
        # kept alive until the last launch; the allocator reuses this memory only for later work on the stream.
        # allocated as int32 because torch's debug fill for integers is NaN when read as any float type
        workspaces = {
            name: (torch.zeros if name == "zeros" else torch.empty)(size // 4, dtype=torch.int32, device=device)
            for name, size in launches.sizes.items()
            if size
        }
        addresses = {name: 0 if x is None else x.data_ptr() for name, x in (tensors | workspaces).items()}
        addresses[NULL.tensor] = 0
        for kernel, grid, template, pointers, buffers in launches.launches:
            # a copy: another thread may run the same launches
            arguments = type(template).from_buffer_copy(template)
            pointers.pack_into(arguments, 0, *[addresses[name] + offset for name, offset in buffers])
            kernel.launch(grid, arguments, stream)


def _aligned_call(call: ScanCall) -> ScanCall:
    """Return the call with inputs that can be read 16 bytes at a time; the others become contiguous."""
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


def _new_states(call: ScanCall, given: Tensor | None) -> Tensor:
    """Return memory for the states of all sequences; an empty packed sequence takes the given state, or zeros."""
    make = torch.empty if call.cu_seqlens is None and call.q.numel() else torch.zeros
    states = make(call.state_shape(), dtype=torch.float32, device=call.q.device)
    return states if make is torch.empty or given is None else states.copy_(given)


def _aligned(x: Tensor) -> Tensor:
    """Return x if its rows can be read 16 bytes at a time, as those of a fused projection can, otherwise a copy."""
    fits = x.data_ptr() % 16 == 0 and _can_be_read(x.stride(), x.element_size())
    # contiguous() would return a contiguous tensor as it is, whatever its address
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache
def _can_be_read(strides: tuple[int, ...], element_size: int) -> bool:
    steps = [s * element_size for s in strides[:-1]]
    # [B, T, H, K]
    in_range = len(steps) != 3 or steps[1] < MAX_ROW_BYTES
    return strides[-1] == 1 and in_range and not any(step % 16 for step in steps)


def _new_like(x: Tensor) -> Tensor:
    """Return an uninitialised contiguous tensor."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
