"""Check the arguments of the public operators; all functions raise UserError, except those about derivatives."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hgrn2.errors import UserError
from hgrn2.ops.call import state_dtype
from hgrn2.ops.tiles import boundaries
from hgrn2.ops.transforms import is_batched
from hgrn2.shapes import describe, require_shape

Q_ACTIVATIONS = ("silu", "sigmoid", "none")
V_ACTIVATIONS = ("none", "silu")
SMALLEST_FLOOR = -69
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def can_read_values(x: Tensor, debug: bool = False) -> bool:
    """Return whether values can be read: not in a trace, nor under vmap, nor where that synchronises.

    Args:
        x: the tensor.
        debug: read values on an accelerator too, which synchronises.
    """
    # traced and fake tensors are of other types and have no values
    return (
        (debug or x.device.type == "cpu")
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not is_batched(x)
    )


def check_tangents(backend: str, *inputs: Tensor | None) -> None:
    """Raise if forward mode would differentiate an operator without such a derivative, which torch would treat as 0."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(f"backend {backend!r} has no derivative in forward mode; use backend='reference'")


def _check_choice(name: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise UserError(f"{name} is {found!r}; wanted one of {', '.join(map(repr, known))}")


def _check_like(name: str, x: Tensor, q: Tensor, dtype: torch.dtype, beside: str = "q") -> None:
    # float64 inputs may come with float32 states and bounds
    if x.dtype != dtype and (x.dtype, dtype) != (torch.float32, torch.float64):
        raise UserError(f"{name} has dtype {x.dtype}; wanted {dtype} beside {beside} of dtype {q.dtype}")
    check_device(name, x, beside, q)


def check_device(name: str, x: Tensor, beside: str, other: Tensor) -> None:
    """Raise a UserError unless two tensors are on one device.

    Args:
        name: name of the first.
        x: the first.
        beside: name of the second.
        other: the second.
    """
    if x.device != other.device:
        raise UserError(f"{name} is on {x.device} and {beside} on {other.device}; move them to one device")


def _check_tensors(**inputs: Tensor) -> None:
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise UserError(f"{name} is {describe(x)}; wanted a tensor")
        if x.layout != torch.strided:
            raise UserError(f"{name} has layout {x.layout}; wanted a dense tensor, torch.strided")


def _check_operands(q: Tensor, x: Tensor, v: Tensor, name: str) -> None:
    if q.dtype not in DTYPES:
        raise UserError(f"q has dtype {q.dtype}; wanted one of {', '.join(map(str, DTYPES))}")
    for label, tensor in ((name, x), ("v", v)):
        _check_tensors(**{label: tensor})
        if tensor.dtype != q.dtype:
            raise UserError(f"{label} has dtype {tensor.dtype} and q {q.dtype}; wanted one dtype for both")
        _check_like(label, tensor, q, q.dtype)


def check_scan(
    q: Tensor, x: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, name: str, debug: bool
) -> None:
    """Check the tensors of a scan; x is the gate's pre-activation or the key, as `name` says."""
    _check_tensors(q=q, v=v)
    if q.dim() != 4 or v.dim() != 4:
        raise UserError(
            f"q and v have shapes {list(q.shape)} and {list(v.shape)}; wanted [B, T, H, K] and [B, T, H, V]"
        )
    require_shape(name, x, "B T H K", q.shape)
    require_shape("v", v, "B T H V", (*q.shape[:3], v.shape[3]))
    _check_widths(q, v)
    _check_operands(q, x, v, name)
    num_states = q.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q, debug)
        num_states = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        require_shape("initial_state", initial_state, "N H K V", (num_states, *q.shape[2:], v.shape[3]))
        _check_like("initial_state", initial_state, q, state_dtype(q))


def _check_widths(q: Tensor, v: Tensor) -> None:
    if 0 in (*q.shape[-2:], v.shape[-1]):
        raise UserError(f"q and v have shapes {list(q.shape)} and {list(v.shape)}; wanted H, K and V of at least 1")


def check_fixed_settings(min_log_decay: float | None, q_activation: str, v_activation: str) -> None:
    """Check the settings that are fixed for a layer."""
    _check_choice("q_activation", q_activation, Q_ACTIVATIONS)
    _check_choice("v_activation", v_activation, V_ACTIVATIONS)
    # it may be a symbol in a trace
    number = isinstance(min_log_decay, Real | torch.SymFloat)
    # NaN fails the comparison. All kernels represent decays down to 1e-30
    if min_log_decay is not None and not (number and SMALLEST_FLOOR <= min_log_decay < 0):
        raise UserError(f"min_log_decay is {min_log_decay!r}; wanted a number in [{SMALLEST_FLOOR}, 0), or None")


def check_settings(
    q: Tensor,
    scale: float,
    *,
    reverse: bool = False,
    min_log_decay: float | None = None,
    q_activation: str = "none",
    v_activation: str = "none",
) -> None:
    """Check the settings of a call."""
    check_fixed_settings(min_log_decay, q_activation, v_activation)
    # the numbers may be symbols in a trace
    if torch.compiler.is_compiling():
        return
    dtype = state_dtype(q)
    # NaN fails the comparison
    if not isinstance(scale, Real) or not abs(scale) <= torch.finfo(dtype).max:
        raise UserError(f"scale is {scale!r}; wanted a number that {dtype} can hold")
    if not isinstance(reverse, int) or reverse not in (False, True):
        raise UserError(f"reverse is {reverse!r}; wanted True or False")


def check_cu_seqlens(cu_seqlens: Tensor, q: Tensor, debug: bool, beside: str = "q") -> None:
    """Check the bounds of packed sequences.

    Args:
        cu_seqlens: the bounds.
        q: the packed rows [1, T, ...].
        debug: read values on an accelerator too.
        beside: name of the packed rows.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise UserError(f"cu_seqlens is {describe(cu_seqlens)}; wanted a tensor [N + 1], int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise UserError(
            f"cu_seqlens is {list(cu_seqlens.shape)} of dtype {cu_seqlens.dtype}; wanted [N + 1], int32 or int64"
        )
    if q.shape[0] != 1:
        raise UserError(
            f"cu_seqlens packs sequences into one row, but the batch is {q.shape[0]}; reshape to B = 1", "contradiction"
        )
    check_device("cu_seqlens", cu_seqlens, beside, q)
    if can_read_values(cu_seqlens, debug):
        boundaries(cu_seqlens, q.shape[1])


def check_lower_bound(lower_bound: Tensor | None, q: Tensor, debug: bool) -> None:
    """Check a lower bound beside q [..., H, K]: shape, dtype, device and values."""
    if lower_bound is None:
        return
    require_shape("lower_bound", lower_bound, "H K", q.shape[-2:])
    check_bound_like("lower_bound", lower_bound, q)
    if can_read_values(lower_bound, debug) and lower_bound.numel():
        low, high = (float(x) for x in lower_bound.detach().aminmax())
        # a NaN fails both comparisons
        if not (low >= 0 and high < 1):
            raise UserError(f"lower_bound has values from {low:g} to {high:g}; wanted all in [0, 1)")


def check_bound_like(name: str, bound: Tensor, x: Tensor, beside: str = "q") -> None:
    """Check dtype and device of a lower bound or state beside an input named `beside`."""
    _check_like(name, bound, x, state_dtype(x), beside)


def check_log_decay(log_f: Tensor, q: Tensor, debug: bool) -> None:
    """Check log decays beside q: shape, dtype, device and values."""
    require_shape("log_f", log_f, "B T H K", q.shape)
    _check_like("log_f", log_f, q, state_dtype(q))
    if can_read_values(log_f, debug) and log_f.numel() and not bool((log_f <= 0).all()):
        raise UserError(f"log_f has values up to {float(log_f.detach().max()):g}; a log decay is at most 0")


def check_step(q: Tensor, f: Tensor, v: Tensor, state: Tensor) -> None:
    """Check the tensors of a step."""
    _check_tensors(q=q, v=v)
    if q.dim() != 3 or v.dim() != 3:
        raise UserError(
            f"q and v of a step have shapes {list(q.shape)} and {list(v.shape)}; wanted [B, H, K] and [B, H, V]"
        )
    require_shape("f", f, "B H K", q.shape)
    require_shape("v", v, "B H V", (*q.shape[:2], v.shape[2]))
    require_shape("state", state, "B H K V", (*q.shape, v.shape[2]))
    _check_widths(q, v)
    _check_operands(q, f, v, "f")
    _check_like("state", state, q, state_dtype(q))
