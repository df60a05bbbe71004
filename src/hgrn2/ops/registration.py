"""Operators in torch's library: opaque to torch.compile, with fake shapes and gradients.

There are four, for all backends: `hgrn2::scan`, `hgrn2::scan_backward`, `hgrn2::step` and `hgrn2::step_in_place`. Each
takes the name of a backend and the flat arguments of a call (`hgrn2.ops.call.SCHEMA`).

Dispatch to an operator written in Python takes longer than the launches of a GPU's kernels. So a plain eager call,
which no compiler, transform, mode or tensor subclass observes, skips the dispatcher and goes through autograd alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hgrn2.ops.backends.base import Backend, find
from hgrn2.ops.call import SCHEMA, ScanCall, ScanGradients, ScanSettings, state_dtype
from hgrn2.ops.checks import check_tangents
from hgrn2.ops.export import is_exporting
from hgrn2.ops.transforms import are_transforms_active, differentiable_by_transforms, map_by_loop
from hgrn2.shapes import BHKV, BHV, BTHV, NHKV

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
# index of the lower bound in arguments that begin with a backend and a plan
_LOWER_BOUND = 2 + ScanCall._fields.index("lower_bound")
_NO_GRADIENTS = (None,) * len(ScanSettings._fields)


def run_scan(call: ScanCall, backend: Backend) -> tuple[BTHV, NHKV]:
    """Run a scan.

    Args:
        call: a checked call.
        backend: one that does not reject it.

    Returns:
        y [B, T, H, V] and the final state [N, H, K, V].
    """
    if "scan" not in backend.opaque:
        y, state, _ = backend.forward(call, 0)
        return y, state
    check_tangents(backend.name, *call[:-1])
    needs_grad = call.needs_gradient()
    # the size of what is kept depends on the length, which an exported program may leave open
    call, plan = backend.plan(call, needs_grad and not is_exporting())
    if not _is_plain_eager(call):
        y, state, _ = _traced_scan(backend.name, plan, *call.flat())
        return y, state
    if needs_grad:
        return _EagerScan.apply(backend, plan, *call)  # pyright: ignore[reportReturnType]
    y, state, _ = backend.forward(call, plan)
    return y, state


def run_step(call: ScanCall, backend: Backend, in_place: bool) -> tuple[BHV, BHKV]:
    """Run one token of each sequence.

    Args:
        call: a checked call, its tensors without a T axis.
        backend: one that does not reject it.
        in_place: write the new state over the initial one; not where gradients are recorded.

    Returns:
        y [B, H, V] and the new state [B, H, K, V].
    """
    if "step" not in backend.opaque:
        return backend.step(call, in_place)
    state = call.initial_state
    assert state is not None
    if call.needs_gradient():
        token = call._replace(q=call.q.unsqueeze(1), f=call.f.unsqueeze(1), v=call.v.unsqueeze(1))
        y, state = run_scan(token, backend)
        return y.squeeze(1), state
    check_tangents(backend.name, *call[:-1])
    if not _is_plain_eager(call):
        operator = _step_in_place_op if in_place else _step_op
        found = operator(backend.name, *call.flat())
        return (found, state) if in_place else found
    if in_place and not state.is_inference():
        # as torch's library does for arguments that an operator mutates
        torch.autograd.graph.increment_version(state)
    return backend.step(call, in_place)


def _is_plain_eager(call: ScanCall) -> bool:
    """Return whether nothing but autograd observes the call."""
    return (
        not torch.compiler.is_compiling()
        and all(x is None or type(x) in _PLAIN_TYPES for x in call[:-1])
        and not call.q.is_meta
        and not are_transforms_active()
        and _get_current_dispatch_mode() is None
    )


class _EagerScan(torch.autograd.Function):
    """A scan that skips torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, plan: int, *fields: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        call = ScanCall(*fields)
        y, final_state, kept = backend.forward(call, plan)
        _save(ctx, backend.name, plan, call, kept)
        # the final state is rarely used: do not allocate zeros for its gradient
        ctx.set_materialize_grads(False)
        return y, final_state

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_final_state: Tensor | None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # with create_graph=True, use the operator, which refuses a second derivative
        compute = _traced_gradients if torch.is_grad_enabled() else _gradients
        return None, None, *_backward(ctx, compute, dy, d_final_state), None, None


def _save(ctx: Any, backend: str, plan: int, call: ScanCall, kept: Tensor | None) -> None:
    ctx.backend, ctx.plan, ctx.settings = backend, plan, call.settings
    ctx.save_for_backward(*call[:-1], kept)


def _backward(
    ctx: Any, compute: Callable[..., ScanGradients], dy: Tensor | None, d_final_state: Tensor | None
) -> ScanGradients:
    *tensors, kept = ctx.saved_tensors
    call = ScanCall._make((*tensors, ctx.settings))
    if dy is None:
        dy = call.v.new_zeros(call.v.shape)
    bound_wanted = call.lower_bound is not None and ctx.needs_input_grad[_LOWER_BOUND]
    return compute(ctx.backend, ctx.plan, call, kept, dy, d_final_state, bound_wanted)


def _gradients(
    backend: str, plan: int, call: ScanCall, kept: Tensor | None, dy: Tensor, d_final_state: Tensor | None,
    bound_wanted: bool,
) -> ScanGradients:  # fmt: skip
    return find(backend).backward(call, plan, kept, dy, d_final_state, bound_wanted)


def _traced_gradients(
    backend: str, plan: int, call: ScanCall, kept: Tensor | None, dy: Tensor, d_final_state: Tensor | None,
    bound_wanted: bool,
) -> ScanGradients:  # fmt: skip
    found = _traced_scan_backward(backend, plan, dy, d_final_state, kept, bound_wanted, *call.flat())
    return ScanGradients(*(None if x is None else d for x, d in zip(_inputs(call, bound_wanted), found, strict=True)))


def _inputs(call: ScanCall, bound_wanted: bool) -> tuple[Tensor | None, ...]:
    """Return the inputs whose gradients are wanted, in the order of `ScanGradients`."""
    return (call.q, call.f, call.k, call.v, call.lower_bound if bound_wanted else None, call.initial_state)


@torch.library.custom_op(
    "hgrn2::scan", mutates_args=(), schema=f"(str backend, SymInt plan, {SCHEMA}) -> (Tensor, Tensor, Tensor)"
)
def _scan_op(backend: str, plan: int, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ScanCall.from_flat(flat)
    y, final_state, kept = find(backend).forward(call, plan)
    # custom ops cannot return None; an empty tensor stands for it
    return y, final_state, final_state.new_empty(0) if kept is None else kept


@_scan_op.register_fake
def _(backend: str, plan: int, *flat: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = ScanCall.from_flat(flat)
    final_state = call.q.new_empty(call.state_shape(), dtype=state_dtype(call.q))
    return call.q.new_empty(call.v.shape), final_state, final_state.new_empty(find(backend).kept_shape(call, plan))


def _set_up_scan(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    backend, plan, *flat = inputs
    _save(ctx, backend, plan, ScanCall.from_flat(flat), output[2])


def _set_up_scan_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _set_up_scan(ctx, inputs, output)
    ctx.set_materialize_grads(False)


def _scan_op_backward(ctx: Any, dy: Tensor | None, d_final_state: Tensor | None, _: Any) -> tuple[Any, ...]:
    return None, None, *_backward(ctx, _traced_gradients, dy, d_final_state), None, *_NO_GRADIENTS


_scan_op.register_autograd(_scan_op_backward, setup_context=_set_up_scan_op)


@torch.library.custom_op(
    "hgrn2::scan_backward",
    mutates_args=(),
    schema=f"(str backend, SymInt plan, Tensor dy, Tensor? d_final_state, Tensor? kept, bool bound_wanted, {SCHEMA})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _scan_backward_op(
    backend: str, plan: int, dy: Tensor, d_final_state: Tensor | None, kept: Tensor | None, bound_wanted: bool,
    *flat: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    call = ScanCall.from_flat(flat)
    found = _gradients(backend, plan, call, kept, dy, d_final_state, bound_wanted)
    wanted = zip(_inputs(call, bound_wanted), found, strict=True)
    return tuple(call.q.new_empty(0) if x is None or d is None else d for x, d in wanted)


@_scan_backward_op.register_fake
def _(
    backend: str, plan: int, dy: Tensor, d_final_state: Tensor | None, kept: Tensor | None, bound_wanted: bool,
    *flat: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    call = ScanCall.from_flat(flat)
    return tuple(call.q.new_empty(0) if x is None else x.new_empty(x.shape) for x in _inputs(call, bound_wanted))


def _set_up_refusal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.backend = inputs[0]


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(f"backend {ctx.backend!r} has no second derivative; use backend='reference'")


_scan_backward_op.register_autograd(_refuse, setup_context=_set_up_refusal)


def _refuse_forward_mode(backend: str, *inputs: Any) -> str:
    return f"backend {backend!r} has no derivative in forward mode; use backend='reference'"


_traced_scan = differentiable_by_transforms(_scan_op, _set_up_scan, _scan_op_backward, _refuse_forward_mode)
_traced_scan_backward = differentiable_by_transforms(_scan_backward_op, _set_up_refusal, _refuse, _refuse_forward_mode)


@torch.library.custom_op("hgrn2::step", mutates_args=(), schema=f"(str backend, {SCHEMA}) -> (Tensor, Tensor)")
def _step_op(backend: str, *flat: Any) -> tuple[Tensor, Tensor]:
    return find(backend).step(ScanCall.from_flat(flat), in_place=False)


@_step_op.register_fake
def _(backend: str, *flat: Any) -> tuple[Tensor, Tensor]:
    call = ScanCall.from_flat(flat)
    return call.q.new_empty(call.v.shape), call.q.new_empty(call.state_shape(), dtype=state_dtype(call.q))


@torch.library.custom_op(
    "hgrn2::step_in_place",
    mutates_args=("initial_state",),
    schema=f"(str backend, {SCHEMA.replace('Tensor? initial_state', 'Tensor(a!)? initial_state')}) -> Tensor",
)
def _step_in_place_op(backend: str, *flat: Any) -> Tensor:
    y, _ = find(backend).step(ScanCall.from_flat(flat), in_place=True)
    return y


@_step_in_place_op.register_fake
def _(backend: str, *flat: Any) -> Tensor:
    call = ScanCall.from_flat(flat)
    return call.q.new_empty(call.v.shape)


for _operator in (_scan_op, _scan_backward_op, _step_op, _step_in_place_op):
    map_by_loop(_operator)
