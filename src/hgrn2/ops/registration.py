"""The backends as torch operators: opaque to torch.compile, with shapes and gradients it can reason about.

The dispatcher's way to an operator written in Python costs more time than the launches of a GPU's kernels. So where
nobody looks on (no compiler, transform, tensor of another type or mode that sees operators) autograd alone is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hgrn2.ops import chunked
from hgrn2.ops.gates import FreeGate, TiedGate


def _with_a_direct_way(
    operator: Callable[..., Any],
    backend: str,
    forward: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """The operator, or the functions it is made of where only autograd need know of the call.

    Args:
        operator: as registered.
        backend: its name, for errors.
        forward: what it does.
        setup: saves for the backward pass what it needs, as torch.library's setup_context.
        backward: as for register_autograd, with the function that finds the gradients as a last argument.
        gradients: that function, not the operator of it.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # the operator refuses a second derivative, if somebody asks for one
            return backward(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads, gradients)

    under_transforms = _with_transforms(operator, backend, setup, backward)

    def call(*inputs: Any) -> Any:
        if not _nobody_looks_on(inputs):
            return under_transforms(*inputs)
        recorded = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        return Direct.apply(*inputs) if recorded else forward(*inputs)

    return call


def _with_transforms(
    operator: Callable[..., Any], backend: str, setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """Lets torch.func differentiate an operator, which torch.library's own registration does not."""

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if not torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            return operator(*inputs)
        try:
            return Transformed.apply(*inputs)
        except NotImplementedError as error:
            if "jvp" not in str(error):
                raise
            # forward mode inside another transform, which `check_tangents` does not see
            raise NotImplementedError(
                f"backend {backend!r} has no derivative in forward mode; use backend='reference'"
            ) from error

    return call


def _without_derivative(operator: Any, backend: str) -> Callable[..., Any]:
    """Makes the derivative of a backward pass an error that says what to do."""

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"backend {backend!r} has no second derivative; use backend='reference'")

    operator.register_autograd(refuse)
    return _with_transforms(operator, backend, lambda ctx, inputs, output: None, refuse)


def _nobody_looks_on(inputs: tuple[Any, ...]) -> bool:
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, torch.nn.Parameter) for x in inputs if isinstance(x, Tensor))
        and not torch._C._are_functorch_transforms_active()
        and _get_current_dispatch_mode() is None
    )


@torch.library.custom_op("hgrn2::chunked_scan", mutates_args=())
def _chunked_scan_op(
    q: Tensor, f: Tensor, v: Tensor, lower_bound: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, reverse: bool, scale: float, q_activation: str, v_activation: str,
    min_log_decay: float | None, tile_chunks: int, keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`hgrn2.ops.hgrn2_scan`, checked already; returns what `hgrn2.ops.chunked.forward` does."""
    gate = TiedGate(q, f, v, lower_bound, scale, q_activation, v_activation, min_log_decay)
    with torch.autocast(q.device.type, enabled=False):
        return chunked.forward(gate, initial_state, cu_seqlens, reverse, tile_chunks, keep_states)


@_chunked_scan_op.register_fake
def _(
    q,
    f,
    v,
    lower_bound,
    initial_state,
    cu_seqlens,
    reverse,
    scale,
    q_activation,
    v_activation,
    min_log_decay,
    tile_chunks,
    keep_states,
):
    return _empty_results(q, v, cu_seqlens, tile_chunks, keep_states)


@torch.library.custom_op("hgrn2::chunked_scan_backward", mutates_args=())
def _scan_backward_op(
    dy: Tensor, d_final_state: Tensor, q: Tensor, f: Tensor, v: Tensor, lower_bound: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, kept: Tensor, reverse: bool, scale: float,
    q_activation: str, v_activation: str, min_log_decay: float | None, tile_chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gate = TiedGate(q, f, v, lower_bound, scale, q_activation, v_activation, min_log_decay)
    with torch.autocast(q.device.type, enabled=False):
        d_initial_state = chunked.backward(
            gate, dy, d_final_state, initial_state, cu_seqlens, kept, reverse, tile_chunks
        )
    dq, df, dv = gate.gradients
    # an operator returns tensors, so nothing is an empty one
    d_bound = q.new_empty(0) if gate.d_bound is None else gate.d_bound.to(gate.dtype)
    return dq, df, dv, d_bound, d_initial_state


@_scan_backward_op.register_fake
def _(
    dy,
    d_final_state,
    q,
    f,
    v,
    lower_bound,
    initial_state,
    cu_seqlens,
    kept,
    reverse,
    scale,
    q_activation,
    v_activation,
    min_log_decay,
    tile_chunks,
):
    d_bound = q.new_empty(0) if lower_bound is None else lower_bound.new_empty(lower_bound.shape)
    return (
        *(x.new_empty(x.shape) for x in (q, f, v)),
        d_bound,
        d_final_state.new_empty(d_final_state.shape),
    )


def _chunked_setup(ctx, inputs, output) -> None:
    # of both operators: six tensors, settings, and whether states are kept
    tensors, ctx.settings = inputs[:6], inputs[6:-1]
    ctx.save_for_backward(*tensors, output[2])


_scan_gradients = _without_derivative(_scan_backward_op, "chunked")


def _scan_backward(ctx, dy, d_final_state, _):
    q, f, v, lower_bound, initial_state, cu_seqlens, kept = ctx.saved_tensors
    dq, df, dv, d_bound, d_initial = _scan_gradients(
        dy, d_final_state, q, f, v, lower_bound, initial_state, cu_seqlens, kept, *ctx.settings
    )
    d_bound = None if lower_bound is None else d_bound
    d_initial = None if initial_state is None else d_initial
    return dq, df, dv, d_bound, d_initial, *[None] * 8


_chunked_scan_op.register_autograd(_scan_backward, setup_context=_chunked_setup)
chunked_scan = _with_transforms(_chunked_scan_op, "chunked", _chunked_setup, _scan_backward)


@torch.library.custom_op("hgrn2::chunked_gated_scan", mutates_args=())
def _chunked_gated_scan_op(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, scale: float, tile_chunks: int, keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`hgrn2.ops.gated_scan`, checked already; returns what `hgrn2.ops.chunked.forward` does."""
    with torch.autocast(q.device.type, enabled=False):
        return chunked.forward(
            FreeGate(q, k, v, log_f, scale), initial_state, cu_seqlens, reverse, tile_chunks, keep_states
        )


@_chunked_gated_scan_op.register_fake
def _(q, k, v, log_f, initial_state, cu_seqlens, reverse, scale, tile_chunks, keep_states):
    return _empty_results(q, v, cu_seqlens, tile_chunks, keep_states)


@torch.library.custom_op("hgrn2::chunked_gated_scan_backward", mutates_args=())
def _gated_backward_op(
    dy: Tensor, d_final_state: Tensor, q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, kept: Tensor, reverse: bool, scale: float, tile_chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gate = FreeGate(q, k, v, log_f, scale)
    with torch.autocast(q.device.type, enabled=False):
        d_initial_state = chunked.backward(
            gate, dy, d_final_state, initial_state, cu_seqlens, kept, reverse, tile_chunks
        )
    dq, dk, dv, d_log_f = gate.gradients
    return dq, dk, dv, d_log_f, d_initial_state


@_gated_backward_op.register_fake
def _(dy, d_final_state, q, k, v, log_f, initial_state, cu_seqlens, kept, reverse, scale, tile_chunks):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, log_f, d_final_state))


_gated_gradients = _without_derivative(_gated_backward_op, "chunked")


def _gated_backward(ctx, dy, d_final_state, _):
    q, k, v, log_f, initial_state, cu_seqlens, kept = ctx.saved_tensors
    dq, dk, dv, d_log_f, d_initial = _gated_gradients(
        dy, d_final_state, q, k, v, log_f, initial_state, cu_seqlens, kept, *ctx.settings
    )
    d_initial = None if initial_state is None else d_initial
    return dq, dk, dv, d_log_f, d_initial, *[None] * 5


_chunked_gated_scan_op.register_autograd(_gated_backward, setup_context=_chunked_setup)
chunked_gated_scan = _with_transforms(_chunked_gated_scan_op, "chunked", _chunked_setup, _gated_backward)


def _triton_forward(
    q: Tensor, f: Tensor, k: Tensor | None, v: Tensor, lower_bound: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, reverse: bool, scale: float, q_activation: str, v_activation: str,
    min_log_decay: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both scans, checked already: with a key k, f is the log decay; without, the gate's pre-activation."""
    from hgrn2.ops.triton import launch

    scan = launch.Scan(
        q, f, k, v, lower_bound, initial_state, cu_seqlens, reverse, scale, q_activation, v_activation, min_log_decay
    )
    return launch.forward(scan)


_triton_op = torch.library.custom_op("hgrn2::triton_scan", _triton_forward, mutates_args=())


@_triton_op.register_fake
def _(q, f, k, v, lower_bound, initial_state, cu_seqlens, reverse, scale, q_activation, v_activation, min_log_decay):
    num_states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = q.new_empty((num_states, *q.shape[2:], v.shape[-1]), dtype=torch.float32)
    return q.new_empty(v.shape), final_state


def _triton_gradients(
    dy: Tensor, d_final_state: Tensor, q: Tensor, f: Tensor, k: Tensor | None, v: Tensor, lower_bound: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool, scale: float, q_activation: str,
    v_activation: str, min_log_decay: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from hgrn2.ops.triton import launch

    scan = launch.Scan(
        q, f, k, v, lower_bound, initial_state, cu_seqlens, reverse, scale, q_activation, v_activation, min_log_decay
    )
    dq, df, dk, dv, d_bound, d_initial = launch.backward(scan, dy, d_final_state)
    # an operator returns tensors, each its own, so nothing is an empty one
    dk, d_bound = (q.new_empty(0) if x is None else x for x in (dk, d_bound))
    return dq, df, dk, dv, d_bound, d_initial


_triton_gradients_op = torch.library.custom_op("hgrn2::triton_scan_backward", _triton_gradients, mutates_args=())


@_triton_gradients_op.register_fake
def _(
    dy,
    d_final_state,
    q,
    f,
    k,
    v,
    lower_bound,
    initial_state,
    cu_seqlens,
    reverse,
    scale,
    q_activation,
    v_activation,
    min_log_decay,
):
    dq, df, dk, dv, d_bound = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, f, k, v, lower_bound))
    return dq, df, dk, dv, d_bound, d_final_state.new_empty(d_final_state.shape)


def _triton_setup(ctx, inputs, output) -> None:
    tensors, ctx.settings = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


_triton_gradients_traced = _without_derivative(_triton_gradients_op, "triton")


def _triton_backward(ctx, dy, d_final_state, gradients=_triton_gradients_traced):
    tensors = ctx.saved_tensors
    _, _, k, _, lower_bound, initial_state, _ = tensors
    dq, df, dk, dv, d_bound, d_initial = gradients(dy, d_final_state, *tensors, *ctx.settings)
    dk = None if k is None else dk
    d_bound = None if lower_bound is None else d_bound
    d_initial = None if initial_state is None else d_initial
    return dq, df, dk, dv, d_bound, d_initial, *[None] * 6


_triton_op.register_autograd(_triton_backward, setup_context=_triton_setup)
triton_scan = _with_a_direct_way(
    _triton_op, "triton", _triton_forward, _triton_setup, _triton_backward, _triton_gradients
)


def _cuda_forward(
    q: Tensor, f: Tensor, v: Tensor, lower_bound: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, reverse: bool, scale: float, q_activation: str, min_log_decay: float | None, coarse: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`hgrn2.ops.hgrn2_scan`, checked already; returns what `hgrn2.ops.cuda.launch.forward` does."""
    from hgrn2.ops.cuda import launch

    scan = launch.Scan(q, f, v, lower_bound, initial_state, cu_seqlens, reverse, scale, q_activation, min_log_decay)
    return launch.forward(scan, coarse)


_cuda_op = torch.library.custom_op("hgrn2::cuda_scan", _cuda_forward, mutates_args=())


@_cuda_op.register_fake
def _(q, f, v, lower_bound, initial_state, cu_seqlens, reverse, scale, q_activation, min_log_decay, coarse):
    from hgrn2.ops.cuda.launch import coarse_shape

    batch, length, heads, width = q.shape
    num_packed = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    num_states = batch if cu_seqlens is None else num_packed
    final_state = q.new_empty((num_states, heads, width, width), dtype=torch.float32)
    kept = coarse_shape(batch, length, heads, coarse, num_packed)
    return q.new_empty(v.shape), final_state, final_state.new_empty(kept)


def _cuda_gradients(
    dy: Tensor, d_final_state: Tensor | None, q: Tensor, f: Tensor, v: Tensor, lower_bound: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, states: Tensor, reverse: bool, scale: float,
    q_activation: str, min_log_decay: float | None, coarse: int, bound_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not coarse:
        # float16 has not the range for the kernels of the backward pass
        from hgrn2.ops.triton import launch as triton_launch

        rest = (cu_seqlens, reverse, scale, q_activation, "none", min_log_decay)
        scan = triton_launch.Scan(q, f, None, v, lower_bound, initial_state, *rest)
        if d_final_state is None:
            num_states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            shape = (num_states, *q.shape[2:], v.shape[-1])
            d_final_state = torch.zeros(shape, dtype=torch.float32, device=q.device)
        dq, df, _, dv, d_bound, d_initial = triton_launch.backward(scan, dy, d_final_state)
        d_initial = None if initial_state is None else d_initial
    else:
        from hgrn2.ops.cuda import launch

        scan = launch.Scan(q, f, v, lower_bound, initial_state, cu_seqlens, reverse, scale, q_activation, min_log_decay)
        dq, df, dv, d_bound, d_initial = launch.backward(scan, dy, d_final_state, states, coarse, bound_wanted)
    d_bound, d_initial = (q.new_empty(0) if x is None else x for x in (d_bound, d_initial))
    return dq, df, dv, d_bound, d_initial


_cuda_gradients_op = torch.library.custom_op("hgrn2::cuda_scan_backward", _cuda_gradients, mutates_args=())


@_cuda_gradients_op.register_fake
def _(
    dy, d_final_state, q, f, v, lower_bound, initial_state, cu_seqlens, states, reverse, scale, q_activation,
    min_log_decay, coarse, bound_wanted,
):  # fmt: skip
    inputs = (q, f, v, lower_bound if bound_wanted or not coarse else None, initial_state)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


def _cuda_setup(ctx, inputs, output) -> None:
    tensors, ctx.settings = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, output[2])
    # the final state is seldom used: no zeros for its gradient
    ctx.set_materialize_grads(False)


_cuda_gradients_traced = _without_derivative(_cuda_gradients_op, "cuda")


def _cuda_backward(ctx, dy, d_final_state, _, gradients=_cuda_gradients_traced):
    if dy is None:
        dy = torch.zeros_like(ctx.saved_tensors[2])
    *_, lower_bound, initial_state, _, _ = tensors = ctx.saved_tensors
    bound_wanted = ctx.needs_input_grad[3]
    dq, df, dv, d_bound, d_initial = gradients(dy, d_final_state, *tensors, *ctx.settings, bound_wanted)
    d_bound = d_bound if lower_bound is not None and bound_wanted else None
    d_initial = None if initial_state is None else d_initial
    return dq, df, dv, d_bound, d_initial, *[None] * 6


_cuda_op.register_autograd(_cuda_backward, setup_context=_cuda_setup)
cuda_scan = _with_a_direct_way(_cuda_op, "cuda", _cuda_forward, _cuda_setup, _cuda_backward, _cuda_gradients)


@torch.library.custom_op("hgrn2::triton_step", mutates_args=())
def triton_step(
    q: Tensor, f: Tensor, v: Tensor, state: Tensor, lower_bound: Tensor | None, scale: float, q_activation: str,
    v_activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`hgrn2.ops.hgrn2_step`, checked already."""
    from hgrn2.ops.triton import launch

    new_state = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    state = state.contiguous()
    return launch.step(q, f, v, state, lower_bound, scale, q_activation, v_activation, new_state), new_state


@triton_step.register_fake
def _(q, f, v, state, lower_bound, scale, q_activation, v_activation):
    return q.new_empty(v.shape), state.new_empty(state.shape)


@torch.library.custom_op("hgrn2::triton_step_in_place", mutates_args=("state",))
def triton_step_in_place(
    q: Tensor, f: Tensor, v: Tensor, state: Tensor, lower_bound: Tensor | None, scale: float, q_activation: str,
    v_activation: str,
) -> Tensor:  # fmt: skip
    """The same, the new state written over the old."""
    from hgrn2.ops.triton import launch

    if state.is_contiguous():
        return launch.step(q, f, v, state, lower_bound, scale, q_activation, v_activation, state)
    new_state = state.contiguous()
    y = launch.step(q, f, v, new_state, lower_bound, scale, q_activation, v_activation, new_state)
    state.copy_(new_state)
    return y


@triton_step_in_place.register_fake
def _(q, f, v, state, lower_bound, scale, q_activation, v_activation):
    return q.new_empty(v.shape)


def _empty_results(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, tile_chunks: int, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = q.shape
    num_states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(q.dtype, torch.float32)
    kept = chunked.kept_states_shape(q, v, cu_seqlens, tile_chunks, keep_states)
    return (
        q.new_empty((batch, length, heads, v.shape[-1])),
        q.new_empty((num_states, heads, width, v.shape[-1]), dtype=dtype),
        q.new_empty(kept, dtype=dtype),
    )
