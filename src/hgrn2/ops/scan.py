"""The public operators: what they check, which backend runs, and how torch.compile sees them."""

from __future__ import annotations

import contextlib
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hgrn2.ops import reference
from hgrn2.ops.backends import resolve_backend, triton_runs
from hgrn2.ops.cuda.plan import coarse_chunks
from hgrn2.ops.gates import activate
from hgrn2.ops.registration import (
    chunked_gated_scan,
    chunked_scan,
    cuda_scan,
    triton_scan,
    triton_step,
    triton_step_in_place,
)
from hgrn2.ops.tiles import boundaries, chunks_per_tile
from hgrn2.shapes import require_shape

Q_ACTIVATIONS = ("silu", "sigmoid", "none")
V_ACTIVATIONS = ("none", "silu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def hgrn2_scan(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    q_activation: str = "silu",
    v_activation: str = "none",
    min_log_decay: float | None = None,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    """HGRN2's mixing of tokens, from pre-activations (arXiv 2404.07904, section 3).

    With beta the lower bound, F_t = beta + (1 - beta) sigmoid(f_t) and k_t = 1 - F_t:

        S_t = Diag(F_t) S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

    Gradients flow to every tensor input, the lower bound and the initial state included.

    Args:
        q: [B, T, H, K], pre-activation of the output gate (the query). Any strides.
        f: [B, T, H, K], pre-activation of the forget gate.
        v: [B, T, H, V], the input.
        lower_bound: [H, K], float32, in [0, 1); None means 0.
        initial_state: [N, H, K, V], float32 (float64 for float64 inputs); None means zeros. N is B, or the number of
            packed sequences.
        cu_seqlens: [N + 1], int32 or int64: sequences packed end to end with B = 1, first row of each and, last, T.
        reverse: run from the last token to the first.
        scale: factor of the outputs.
        q_activation: "silu", "sigmoid" or "none", applied to q.
        v_activation: "none" or "silu", applied to v.
        min_log_decay: a floor, below 0, under the decay's logarithm: S_{t-1} is multiplied by the larger of F_t and
            e^min_log_decay, and k_t stays 1 - F_t. The authors train with -3 (their code; the paper has none).
        backend: "auto", "cuda" (kernels for Hopper GPUs: bfloat16 or float16, K = V = 128), "triton" (kernels for any
            GPU of NVIDIA), "chunked" (plain torch on any device) or "reference" (step by step). All are exact for any
            gate.
        debug: check values on an accelerator too, which waits for it; on a CPU they always are. Without it cu_seqlens
            that do not rise from 0 to T give rows of zeros, or rows that belong to another sequence.

    Returns:
        y [B, T, H, V] in q's dtype, and the final state [N, H, K, V] in the state's dtype.

    Raises:
        ValueError: shapes, dtypes, devices, values of cu_seqlens or of the lower bound that do not fit; values are
            checked where that needs no wait for an accelerator.
        NotImplementedError: a derivative in forward mode is asked of another backend than "reference".
        RuntimeError: likewise a second derivative.

    Example:
        >>> import torch, hgrn2
        >>> q, f, v = torch.randn(3, 2, 100, 4, 32).unbind(0)
        >>> y, state = hgrn2.ops.hgrn2_scan(q, f, v, torch.full((4, 32), 0.5))
        >>> y.shape, state.shape
        (torch.Size([2, 100, 4, 32]), torch.Size([2, 4, 32, 32]))
    """
    _check_scan(q, f, v, initial_state, cu_seqlens, "f", debug)
    _check_settings(q, scale, reverse, min_log_decay)
    _check_lower_bound(lower_bound, q, debug)
    _check_choice("q_activation", q_activation, Q_ACTIVATIONS)
    _check_choice("v_activation", v_activation, V_ACTIVATIONS)
    lower_bound, initial_state = _as_state(lower_bound, q), _as_state(initial_state, q)
    # a launch takes no larger batch
    plain = q.shape[0] < 1 << 16
    backend = _resolve(backend, q, v, plain)
    _check_tangents(backend, q, f, v, lower_bound, initial_state)
    if backend == "cuda":
        # rounded as every product of its kernels would round it
        v = activate(v, v_activation)
        keep = _needs_gradient(q, f, v, lower_bound, initial_state) and q.dtype == torch.bfloat16
        num_packed = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        batch, length, heads, _ = q.shape
        coarse = coarse_chunks(batch, length, heads, num_packed) if keep else 0
        y, state, _ = cuda_scan(
            q, f, v, lower_bound, initial_state, cu_seqlens, reverse, float(scale), q_activation, min_log_decay, coarse
        )
        return y, state
    if backend == "triton":
        return triton_scan(
            q, f, None, v, lower_bound, initial_state, cu_seqlens, reverse, float(scale), q_activation, v_activation,
            min_log_decay,
        )  # fmt: skip
    if backend == "reference":
        dtype = _state_dtype(q)
        gate, key = reference.tied_gate(f.to(dtype), lower_bound)
        gate = reference.held_above(gate, min_log_decay)
        y, state = reference.recurrence(
            reference.activation(q.to(dtype), q_activation), key, reference.activation(v.to(dtype), v_activation), gate,
            _initial_state(initial_state, q, v, cu_seqlens), cu_seqlens, reverse, scale,
        )  # fmt: skip
        return y.to(q.dtype), state
    keep = _needs_gradient(q, f, v, lower_bound, initial_state)
    tile_chunks = chunks_per_tile(q.shape[2], max(q.shape[3], v.shape[3]), q.dtype, q.device)
    y, state, _ = chunked_scan(
        q,
        f,
        v,
        lower_bound,
        initial_state,
        cu_seqlens,
        reverse,
        float(scale),
        q_activation,
        v_activation,
        min_log_decay,
        tile_chunks,
        keep,
    )
    return y, state


def gated_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    """The same recurrence with a key of its own and the decay given as its logarithm.

        S_t = Diag(exp(log_f_t)) S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

    Args:
        q: [B, T, H, K]. Any strides.
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_f: [B, T, H, K], float32 (float64 for float64 inputs), at most 0; -inf is a full reset.
        initial_state: as in `hgrn2_scan`, likewise cu_seqlens, reverse, scale and backend.
        cu_seqlens: see initial_state.
        reverse: see initial_state.
        scale: see initial_state.
        backend: see initial_state; "cuda" has no kernels for this operator.
        debug: see initial_state.

    Returns:
        y [B, T, H, V] in q's dtype, and the final state [N, H, K, V].

    Raises:
        ValueError: as `hgrn2_scan`, like the other errors; and for a log_f above 0 on the CPU.

    Example:
        >>> import torch, hgrn2
        >>> q, k, v = torch.randn(3, 1, 50, 2, 16).unbind(0)
        >>> y, state = hgrn2.ops.gated_scan(q, k, v, -torch.rand(1, 50, 2, 16))
    """
    _check_scan(q, k, v, initial_state, cu_seqlens, "k", debug)
    _check_settings(q, scale, reverse)
    require_shape("log_f", log_f, "B T H K", q.shape)
    _check_like("log_f", log_f, q, _state_dtype(q))
    if _values_are_at_hand(log_f, debug) and log_f.numel() and not bool((log_f <= 0).all()):
        raise ValueError(f"log_f has values up to {float(log_f.detach().max()):g}; a log decay is at most 0")
    log_f, initial_state = log_f.to(_state_dtype(q)), _as_state(initial_state, q)
    backend = _resolve(backend, q, v, plain=False)
    _check_tangents(backend, q, k, v, log_f, initial_state)
    if backend == "triton":
        return triton_scan(q, log_f, k, v, None, initial_state, cu_seqlens, reverse, float(scale), "none", "none", None)
    if backend == "reference":
        dtype = _state_dtype(q)
        state = _initial_state(initial_state, q, v, cu_seqlens)
        operands = (q.to(dtype), k.to(dtype), v.to(dtype), torch.exp(log_f))
        y, state = reference.recurrence(*operands, state, cu_seqlens, reverse, scale)
        return y.to(q.dtype), state
    keep = _needs_gradient(q, k, v, log_f, initial_state)
    tile_chunks = chunks_per_tile(q.shape[2], max(q.shape[3], v.shape[3]), q.dtype, q.device)
    y, state, _ = chunked_gated_scan(
        q, k, v, log_f, initial_state, cu_seqlens, reverse, float(scale), tile_chunks, keep
    )
    return y, state


def hgrn2_step(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    state: Tensor,
    lower_bound: Tensor | None = None,
    *,
    scale: float = 1.0,
    q_activation: str = "silu",
    v_activation: str = "none",
    inplace: bool = False,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token of `hgrn2_scan`, for decoding with a state of constant size.

    Args:
        q: [B, H, K], pre-activation of the output gate.
        f: [B, H, K], pre-activation of the forget gate.
        v: [B, H, V].
        state: [B, H, K, V], float32 (float64 for float64 inputs); changed only if `inplace`.
        lower_bound: [H, K], float32 in [0, 1); None means 0.
        scale: factor of the outputs.
        q_activation: as in `hgrn2_scan`.
        v_activation: as in `hgrn2_scan`.
        inplace: write the new state over `state`, which saves its memory and, in a captured graph, its address.
        backend: as in `hgrn2_scan`; "cuda" and "triton" are one kernel, Triton's. Without it all run the same few
            element-wise operations.
        debug: as in `hgrn2_scan`.

    Returns:
        y [B, H, V] in q's dtype, and the new state.

    Raises:
        ValueError: as `hgrn2_scan`.

    Example:
        >>> import torch, hgrn2
        >>> q, f, v = torch.randn(3, 1, 4, 32).unbind(0)
        >>> y, state = hgrn2.ops.hgrn2_step(q, f, v, torch.zeros(1, 4, 32, 32))
    """
    _check_tensors(q=q, v=v)
    if q.dim() != 3 or v.dim() != 3:
        raise ValueError(
            f"q and v of a step have shapes {list(q.shape)} and {list(v.shape)}; wanted [B, H, K] and [B, H, V]"
        )
    require_shape("f", f, "B H K", q.shape)
    require_shape("v", v, "B H V", (*q.shape[:2], v.shape[2]))
    require_shape("state", state, "B H K V", (*q.shape, v.shape[2]))
    _check_widths(q, v)
    _check_settings(q, scale)
    _check_operands(q, f, v, "f")
    _check_like("state", state, q, _state_dtype(q))
    _check_lower_bound(lower_bound, q, debug)
    _check_choice("q_activation", q_activation, Q_ACTIVATIONS)
    _check_choice("v_activation", v_activation, V_ACTIVATIONS)
    dtype = _state_dtype(q)
    if backend == "cuda":
        # a step is Triton's kernel whichever the scan's are; without Triton, a few operations of torch
        backend = "chunked" if q.is_cuda and not triton_runs() else "triton"
    backend = _resolve(backend, q, v, plain=False)
    if inplace and state.dtype != dtype:
        raise ValueError(f"state has dtype {state.dtype}; to be changed in place it must be {dtype}")
    if inplace and _needs_gradient(q, f, v, state, lower_bound):
        raise ValueError("a state cannot be changed in place where gradients are recorded; use torch.no_grad()")
    new_state = state
    state, lower_bound = state.to(dtype), _as_state(lower_bound, q)
    if backend == "triton":
        _check_tangents(backend, q, f, v, state, lower_bound)
        if _needs_gradient(q, f, v, state, lower_bound):
            y, state = triton_scan(
                *(x.unsqueeze(1) for x in (q, f)), None, v.unsqueeze(1), lower_bound, state, None, False, float(scale),
                q_activation, v_activation, None,
            )  # fmt: skip
            return y.squeeze(1), state
        arguments = (q, f, v, state, lower_bound, float(scale), q_activation, v_activation)
        return (triton_step_in_place(*arguments), state) if inplace else triton_step(*arguments)
    gate, key = reference.tied_gate(f.to(dtype), lower_bound)
    value = activate(v.to(dtype), v_activation)
    query = activate(q.to(dtype), q_activation)
    state = torch.addcmul(key.unsqueeze(-1) * value.unsqueeze(-2), gate.unsqueeze(-1), state)
    # tensors that only have a shape know no autocast
    with contextlib.nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
        y = torch.matmul(query.unsqueeze(-2), state).squeeze(-2)
    if inplace:
        state = new_state.copy_(state)
    return (y * scale if scale != 1 else y).to(q.dtype), state


# what is checked before anything runs


def _resolve(backend: str, q: Tensor, v: Tensor, plain: bool) -> str:
    return resolve_backend(backend, q.device, q.dtype, q.shape[-1], v.shape[-1], plain)


def _state_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _as_state(x: Tensor | None, q: Tensor) -> Tensor | None:
    return None if x is None else x.to(_state_dtype(q))


def _values_are_at_hand(x: Tensor, debug: bool) -> bool:
    """Whether values can be looked at: without waiting for an accelerator, unless asked to, or breaking a trace."""
    # a traced or fake tensor is of another type and has no values
    return (
        (debug or x.device.type == "cpu")
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )


def _needs_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _check_tangents(backend: str, *inputs: Tensor | None) -> None:
    """Torch would take the derivative of an operator that has none in forward mode for zero."""
    if backend == "reference" or torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(f"backend {backend!r} has no derivative in forward mode; use backend='reference'")


def _check_choice(name: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise ValueError(f"{name} is {found!r}; wanted one of {', '.join(map(repr, known))}")


def _check_like(name: str, x: Tensor, q: Tensor, dtype: torch.dtype) -> None:
    # what is kept in float32 may stay so beside float64 inputs
    if x.dtype != dtype and (x.dtype, dtype) != (torch.float32, torch.float64):
        raise ValueError(f"{name} has dtype {x.dtype}; wanted {dtype} beside q of dtype {q.dtype}")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} and q on {q.device}; move them to one device")


def _check_tensors(**inputs: Tensor) -> None:
    for name, x in inputs.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is {'None' if x is None else f'a {type(x).__name__}'}; wanted a tensor")
        if x.layout != torch.strided:
            raise ValueError(f"{name} has layout {x.layout}; wanted a dense tensor, torch.strided")


def _check_operands(q: Tensor, x: Tensor, v: Tensor, name: str) -> None:
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; wanted one of {', '.join(map(str, DTYPES))}")
    for label, tensor in ((name, x), ("v", v)):
        _check_tensors(**{label: tensor})
        if tensor.dtype != q.dtype:
            raise ValueError(f"{label} has dtype {tensor.dtype} and q {q.dtype}; wanted one dtype for both")
        _check_like(label, tensor, q, q.dtype)


def _check_scan(
    q: Tensor, x: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, name: str, debug: bool
) -> None:
    _check_tensors(q=q, v=v)
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q and v have shapes {list(q.shape)} and {list(v.shape)}; wanted [B, T, H, K] and [B, T, H, V]"
        )
    require_shape(name, x, "B T H K", q.shape)
    require_shape("v", v, "B T H V", (*q.shape[:3], v.shape[3]))
    _check_widths(q, v)
    _check_operands(q, x, v, name)
    num_states = q.shape[0]
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q, debug)
        num_states = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        require_shape("initial_state", initial_state, "N H K V", (num_states, *q.shape[2:], v.shape[3]))
        _check_like("initial_state", initial_state, q, _state_dtype(q))


def _check_widths(q: Tensor, v: Tensor) -> None:
    if 0 in (*q.shape[-2:], v.shape[-1]):
        raise ValueError(f"q and v have shapes {list(q.shape)} and {list(v.shape)}; wanted H, K and V of at least 1")


def _check_settings(q: Tensor, scale: float, reverse: bool = False, min_log_decay: float | None = None) -> None:
    # a trace may hold the numbers as symbols
    if torch.compiler.is_compiling():
        return
    dtype = _state_dtype(q)
    # not a number fails the comparison
    if not isinstance(scale, Real) or not abs(scale) <= torch.finfo(dtype).max:
        raise ValueError(f"scale is {scale!r}; wanted a number that {dtype} can hold")
    if not isinstance(reverse, int) or reverse not in (False, True):
        raise ValueError(f"reverse is {reverse!r}; wanted True or False")
    if min_log_decay is not None and not (isinstance(min_log_decay, Real) and min_log_decay < 0):
        raise ValueError(f"min_log_decay is {min_log_decay!r}; wanted a number below 0, or None")


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor, debug: bool) -> None:
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is {cu_seqlens!r}; wanted a tensor [N + 1], int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {list(cu_seqlens.shape)} of dtype {cu_seqlens.dtype}; wanted [N + 1], int32 or int64"
        )
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens packs sequences into one row, but the batch is {q.shape[0]}; reshape to B = 1")
    if cu_seqlens.device != q.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and q on {q.device}; move them to one device")
    if _values_are_at_hand(cu_seqlens, debug):
        boundaries(cu_seqlens, q.shape[1])


def _check_lower_bound(lower_bound: Tensor | None, q: Tensor, debug: bool) -> None:
    if lower_bound is None:
        return
    require_shape("lower_bound", lower_bound, "H K", q.shape[-2:])
    _check_like("lower_bound", lower_bound, q, _state_dtype(q))
    if _values_are_at_hand(lower_bound, debug) and lower_bound.numel():
        low, high = (float(x) for x in lower_bound.detach().aminmax())
        # a NaN fails both comparisons
        if not (low >= 0 and high < 1):
            raise ValueError(f"lower_bound has values from {low:g} to {high:g}; wanted all in [0, 1)")


def _initial_state(initial_state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    num_states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros((num_states, *q.shape[2:], v.shape[3]), dtype=_state_dtype(q))
