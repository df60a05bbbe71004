"""The element-wise recurrence h_t = a_t h_{t-1} + b_t, of real or complex numbers, and its gradients in plain torch.

There are two forms. "steps" goes from token to token and reads every number once: best on a CPU with wide rows.
"halving" joins neighbours in pairs, h_{t+1} = (a_{t+1} a_t) h_{t-1} + (a_{t+1} b_t + b_{t+1}), solves the sequence of
half the length and fills in the rest: 2 log T operations, for devices where each costs a launch. Neither divides, so
decays may be tiny or 0. The backward pass keeps a, h and the initial state.

On a GPU, the Triton kernels of `hgrn2.ops.linear_kernels` take the place of both.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.ops.checks import check_cu_seqlens, check_device
from hgrn2.ops.export import refuse_onnx
from hgrn2.ops.linear_kernels import scan_by_kernels
from hgrn2.ops.tiles import boundaries
from hgrn2.ops.transforms import differentiable_by_transforms, map_by_loop, refuse_derivatives
from hgrn2.ops.triton.installed import choose_kernels
from hgrn2.shapes import describe, require_shape

BACKENDS = ("auto", "triton", "steps", "halving", "reference")
# numbers of a row, B * D, from which a CPU spends less on steps than on the additional passes of "halving"
_WIDE_ROW = 1024


def linear_scan(
    a: Tensor,
    b: Tensor,
    *,
    rotation: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute h_t = a_t h_{t-1} + b_t, element by element, in float32 or wider.

    Gradients flow to a, b and the initial state; second derivatives need "reference".

    Args:
        a: [B, T, ...], real or complex, finite, of magnitude at most 1; any strides. Padding keeps the state with
            a = 1, b = 0. Low precision is a poor choice here: bfloat16 rounds decays near 1 to 1.
        b: like a, of any floating or complex dtype.
        rotation: [...], complex, multiplies the real a of every token; None means 1. Kernels then read half the bytes.
        initial_state: [N, ...] in the dtype of the state; None means zeros. N is B, or the number of packed sequences.
        cu_seqlens: [N + 1], int32 or int64: bounds of packed sequences, B = 1.
        reverse: run from the last token of each sequence to its first.
        backend: "auto", "triton" (kernels for NVIDIA GPUs), "steps", "halving" or "reference" (one token after the
            other, differentiated by autograd). "auto" is "triton" on a GPU where Triton is installed, if the state is
            float32 or complex64.
        debug: check the values of cu_seqlens on an accelerator too, which waits for it.

    Returns:
        h [B, T, ...], and the state after the last token, [N, ...] in the dtype of the state: that of a * b, but at
        least float32. h has this dtype too, except that h of a real bfloat16 or float16 b is rounded to b's dtype.

    Raises:
        UserError: shapes, dtypes, devices, settings or values of cu_seqlens do not fit.

    Example:
        >>> import torch
        >>> from hgrn2.ops import linear_scan
        >>> h, state = linear_scan(torch.full((1, 4, 1), 0.5), torch.ones(1, 4, 1))
        >>> h.flatten().tolist(), state.flatten().tolist()
        ([1.0, 1.5, 1.75, 1.875], [1.875])
    """
    dtype = _check(a, b, rotation, initial_state, cu_seqlens, backend, debug)
    kept = b.dtype if b.dtype.itemsize < 4 and not dtype.is_complex else dtype
    if choose_kernels(backend, a.device, dtype, a.dtype, b.dtype):
        refuse_onnx("linear_scan")
        h, state = scan_by_kernels(a, b, rotation, initial_state, cu_seqlens, reverse, dtype.is_complex)
        return h.to(kept), state
    a, b = (a if rotation is None else a * rotation).to(dtype), b.to(dtype)
    num = a.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = a.new_zeros((num, *a.shape[2:])) if initial_state is None else initial_state.to(dtype)
    length = a.shape[1]
    if backend == "reference":
        h, state = _reference(a, b, state, cu_seqlens, reverse)
    elif isinstance(length, int) and length < 2 and cu_seqlens is None:
        h = a * state.unsqueeze(1) + b
        state = h[:, 0] if length else state
    elif cu_seqlens is None:
        refuse_onnx("linear_scan")
        h = _traced_scan(a, b, state, reverse, backend)
        # a view would keep all of h in memory
        state = h[:, 0 if reverse else -1].clone()
    elif length:
        h, state = _packed(a, b, state, cu_seqlens, reverse, backend)
    else:
        h = b
    return h.to(kept), state


def _check(
    a: Tensor, b: Tensor, rotation: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None,
    backend: str, debug: bool,
) -> torch.dtype:  # fmt: skip
    """Check the arguments, and return the dtype of the state."""
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, Tensor) or x.dim() < 3 or not (x.is_floating_point() or x.is_complex()):
            raise UserError(f"{name} is {describe(x)}; wanted a floating or complex tensor [B, T, ...]")
    if a.shape != b.shape:
        raise UserError(f"a has shape {list(a.shape)} and b {list(b.shape)}; wanted one shape", "mismatch")
    check_device("b", b, "a", a)
    if backend not in BACKENDS:
        raise UserError(f"backend is {backend!r}; wanted one of {', '.join(map(repr, BACKENDS))}", "unknown-name")
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if rotation is not None:
        if not isinstance(rotation, Tensor) or not rotation.is_complex() or a.is_complex():
            raise UserError(f"rotation is {describe(rotation)}; wanted a complex tensor, beside a real a")
        require_shape("rotation", rotation, " ".join(["D", "E", "F", "G"][: a.dim() - 2]), tuple(a.shape[2:]))
        check_device("rotation", rotation, "a", a)
        dtype = torch.promote_types(dtype, rotation.dtype)
    num = a.shape[0]
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, a, debug, "a")
        num = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        letters = " ".join(["N", "D", "E", "F", "G"][: a.dim() - 1])
        require_shape("initial_state", initial_state, letters, (num, *a.shape[2:]))
        if torch.promote_types(initial_state.dtype, dtype) != dtype:
            raise UserError(f"initial_state has dtype {initial_state.dtype}; wanted {dtype}", "mismatch")
        check_device("initial_state", initial_state, "a", a)
    return dtype


def _reference(a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """Run the recurrence as it is written, sequence by sequence and token by token."""
    if cu_seqlens is not None:
        bounds = list(itertools.pairwise(boundaries(cu_seqlens, a.shape[1])))
        found = [_reference(a[:, i:j], b[:, i:j], state[n : n + 1], None, reverse) for n, (i, j) in enumerate(bounds)]
        return (torch.cat([h for h, _ in found], 1), torch.cat([s for _, s in found])) if found else (b, state)
    outputs = []
    steps = range(a.shape[1])
    for t in reversed(steps) if reverse else steps:
        state = a[:, t] * state + b[:, t]
        outputs.append(state)
    return torch.stack(outputs[::-1] if reverse else outputs, 1) if outputs else b, state


def _packed(
    a: Tensor, b: Tensor, state: Tensor, cu_seqlens: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Run packed sequences as one: at the first token of each, its initial state enters through b, and a is 0."""
    starts, stops = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    # rows of an empty sequence are those of another, and are masked
    first, last = (x.clamp(0, a.shape[1] - 1) for x in ((stops - 1, starts) if reverse else (starts, stops - 1)))
    filled = (stops > starts).view(-1, *[1] * (a.dim() - 2))
    entering = torch.where(filled, a[0].index_select(0, first) * state, 0)
    b = b.index_add(1, first, entering.unsqueeze(0))
    count = torch.zeros(a.shape[1], device=a.device, dtype=torch.long)
    is_first = count.index_add(0, first, (stops > starts).long()) > 0
    a = a.masked_fill(is_first.view(1, -1, *[1] * (a.dim() - 2)), 0)
    h = _traced_scan(a, b, torch.zeros_like(a[:, 0]), reverse, backend)
    return h, torch.where(filled, h[0].index_select(0, last), state)


def scan_into(a: Tensor, b: Tensor, state: Tensor, reverse: bool, backend: str, out: Tensor) -> None:
    """Write h [B, T, ...] into out."""
    if backend == "auto":
        wide = a.shape[1] and a.numel() // a.shape[1] >= _WIDE_ROW
        backend = "steps" if a.device.type == "cpu" and wide else "halving"
    if backend == "halving":
        if reverse:
            a, b = a.flip(1), b.flip(1)
        _halve(a, b, state, out)
        if reverse:
            out.copy_(out.flip(1))
        return
    rows = list(zip(a.unbind(1), b.unbind(1), out.unbind(1), strict=True))
    for decay, value, place in reversed(rows) if reverse else rows:
        state = torch.addcmul(value, decay, state, out=place)


def _halve(a: Tensor, b: Tensor, state: Tensor, out: Tensor) -> None:
    """Write h [B, T, ...] into out, in a number of operations that grows as log T."""
    pairs = a.shape[1] // 2
    if pairs:
        odd = slice(1, 2 * pairs, 2)
        before = slice(0, 2 * pairs, 2)
        joined = torch.empty_like(b[:, odd])
        _halve(a[:, odd] * a[:, before], torch.addcmul(b[:, odd], a[:, odd], b[:, before]), state, joined)
        out[:, odd] = joined
        rest = a.shape[1] - pairs - 1
        out[:, 2::2] = torch.addcmul(b[:, 2::2], a[:, 2::2], joined[:, :rest])
    out[:, :1] = torch.addcmul(b[:, :1], a[:, :1], state.unsqueeze(1))


@torch.library.custom_op("hgrn2::linear_scan", mutates_args=())
def _scan_op(a: Tensor, b: Tensor, state: Tensor, reverse: bool, backend: str) -> Tensor:
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    scan_into(a, b, state, reverse, backend, h)
    return h


@_scan_op.register_fake
def _(a: Tensor, b: Tensor, state: Tensor, reverse: bool, backend: str) -> Tensor:
    return torch.empty(b.shape, dtype=b.dtype, device=b.device)


@torch.library.custom_op("hgrn2::linear_scan_backward", mutates_args=())
def _backward_op(
    a: Tensor, h: Tensor, state: Tensor, dh: Tensor, reverse: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a, b and the state: db_t = dh_t + conj(a_{t+1}) db_{t+1}, da_t = db_t conj(h_{t-1})."""
    da, db = torch.empty_like(h), torch.empty_like(h)
    length = h.shape[1]
    # the tokens with one after them, these next ones, and the first and last token, in the direction of the scan
    if reverse:
        now, after, first, last = slice(1, length), slice(0, length - 1), length - 1, 0
    else:
        now, after, first, last = slice(0, length - 1), slice(1, length), 0, length - 1
    db[:, last] = dh[:, last]
    scan_into(a[:, after].conj(), dh[:, now], dh[:, last], not reverse, backend, db[:, now])
    torch.mul(db[:, after], h[:, now].conj(), out=da[:, after])
    da[:, first] = db[:, first] * state.conj()
    return da, db, db[:, first] * a[:, first].conj()


@_backward_op.register_fake
def _(a: Tensor, h: Tensor, state: Tensor, dh: Tensor, reverse: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(h), torch.empty_like(h), torch.empty_like(state)


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, state, ctx.reverse, ctx.backend = inputs
    ctx.save_for_backward(a, output, state)


def _differentiate(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    a, h, state = ctx.saved_tensors
    return *_traced_backward(a, h, state, dh, ctx.reverse, ctx.backend), None, None


_scan_op.register_autograd(_differentiate, setup_context=_set_up)

_FURTHER = "linear_scan has no second derivative, and none in forward mode; use backend='reference'"
_traced_scan = differentiable_by_transforms(_scan_op, _set_up, _differentiate, lambda *_: _FURTHER)
_traced_backward = refuse_derivatives(_backward_op, _FURTHER)
for _operator in (_scan_op, _backward_op):
    map_by_loop(_operator)
