"""The scans in operations that every exporter knows: element-wise ones, a matrix product and a loop over tokens.

The operators of the backends mean nothing outside this package, so a program for another runtime is traced through the
functions here. They are as exact as the backends for any gate. They loop over tokens because the joins of
`hgrn2.ops.chunked` are 200 operations a scan, which take the exporter ten seconds a layer.

ONNX has an operator for this recurrence, LinearAttention, which `use_linear_attention` asks for.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from hgrn2.ops.checks import state_dtype
from hgrn2.ops.chunked import COMPLEMENT_BELOW
from hgrn2.ops.gates import Floor

# domains that define LinearAttention: the standard's and ONNX Runtime's own
STANDARD = "ai.onnx"
LINEAR_ATTENTION = (STANDARD, "com.microsoft")

_linear_attention: ContextVar[str | None] = ContextVar("linear_attention", default=None)


def is_exporting() -> bool:
    """Whether the call is being traced by `torch.export` or `torch.onnx.export`."""
    # torch.compiler.is_exporting() is true under torch.compile as well, up to torch 2.11 at least
    return torch.compiler._is_exporting_flag


def is_onnx_export() -> bool:
    """Whether the call is being traced by `torch.onnx.export`."""
    return is_exporting() and _is_in_onnx_export()


# a compiler would take it for false
@torch.compiler.assume_constant_result
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


@contextlib.contextmanager
def use_linear_attention(domain: str | None) -> Iterator[None]:
    """Makes scans traced inside ONNX's LinearAttention of a domain; None for ordinary operations.

    Args:
        domain: "ai.onnx", "com.microsoft" or None.
    """
    token = _linear_attention.set(domain)
    try:
        yield
    finally:
        _linear_attention.reset(token)


def tied_scan(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    scale: float,
    q_activation: str,
    v_activation: str,
    min_log_decay: float | None,
) -> tuple[Tensor, Tensor]:
    """`hgrn2.ops.hgrn2_scan`, its arguments checked."""
    dtype = state_dtype(q)
    f = f.to(dtype)
    decay, key = _sigmoid(f), _sigmoid(-f)
    if lower_bound is not None:
        lower_bound = lower_bound.to(dtype)
        decay, key = decay + lower_bound * key, (1 - lower_bound) * key
    complement, floor = key, Floor.of(min_log_decay)
    if floor.decay:
        decay, complement = decay.clamp(min=floor.decay), key.clamp(max=floor.lost)
    query, value = _activate(q.to(dtype), q_activation), _activate(v.to(dtype), v_activation)
    if _linear_attention.get() is not None:
        log_decay = torch.where(complement < COMPLEMENT_BELOW, _log1p(-complement), decay.log())
        y, state = _onnx_scan(query, key, value, log_decay, initial_state, cu_seqlens, reverse, scale)
    else:
        y, state = _scan(query, key, value, decay, complement, initial_state, cu_seqlens, reverse, scale)
    return y.to(q.dtype), state


def free_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_f: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`hgrn2.ops.gated_scan`, its arguments checked."""
    dtype = state_dtype(q)
    query, key, value = (x.to(dtype) for x in (q, k, v))
    if _linear_attention.get() is not None:
        y, state = _onnx_scan(query, key, value, log_f, initial_state, cu_seqlens, reverse, scale)
    else:
        decay, complement = log_f.exp(), -_expm1(log_f)
        y, state = _scan(query, key, value, decay, complement, initial_state, cu_seqlens, reverse, scale)
    return y.to(q.dtype), state


def _scan(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, c: Tensor, state: Tensor | None, cu_seqlens: Tensor | None,
    reverse: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scan token by token, from activated q, k and v, the decay f and its complement c = 1 - f."""
    # not public yet, though exporters know it. Not its wrapper `scan`, which compiles and so fails where a trace has
    # found two lengths to be one
    from torch._higher_order_ops.scan import scan_op

    _check_not_packed(cu_seqlens)
    batch, _, heads, width = q.shape
    state = q.new_zeros((batch, heads, width, v.shape[-1])) if state is None else state
    # near 1 a decay has fewer digits than its complement, and rounding errors of equal gates all point the same way
    is_small = c < COMPLEMENT_BELOW
    keep, change = is_small.to(f.dtype), torch.where(is_small, -c, f)
    rows = [x.unsqueeze(-2) for x in (q * scale, v)] + [x.unsqueeze(-1) for x in (k, keep, change)]
    rows = [x.flip(1).transpose(0, 1) if reverse else x.transpose(0, 1) for x in rows]  # [T, B, H, 1, K], [.., K, 1]
    # detached, for torch would prepare a backward pass
    results: Any = scan_op(_token, [state.detach()], [x.detach() for x in rows], ())
    end, y = results
    y = y.squeeze(-2).transpose(0, 1)
    return y.flip(1) if reverse else y, end


def _token(state: Tensor, q: Tensor, v: Tensor, k: Tensor, keep: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    state = k * v + change * state + keep * state
    return state, q @ state


def _onnx_scan(
    q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, state: Tensor | None, cu_seqlens: Tensor | None, reverse: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scans with ONNX's LinearAttention, update rule "gated"."""
    _check_not_packed(cu_seqlens)
    if q.dtype != torch.float32:
        raise ValueError(f"q has dtype {q.dtype}; LinearAttention's runtimes take float32, leave linear_attention out")
    batch, _, heads, width = q.shape
    state = q.new_zeros((batch, heads, width, v.shape[-1])) if state is None else state
    # scaled here: the operator takes a scale of 0 for "by the width"
    inputs = [x.flip(1) if reverse else x for x in (q * scale, k, v, log_f)]
    q, k, v, log_f = (x.flatten(2) for x in inputs)
    y, state = torch.onnx.ops.symbolic_multi_out(
        f"{_linear_attention.get()}::LinearAttention",
        (q, k, v, state, log_f),
        {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": "gated", "scale": 1.0},
        dtypes=(q.dtype, q.dtype),
        shapes=(v.shape, state.shape),
        version=1,
    )
    y = y.unflatten(2, (heads, v.shape[2] // heads))
    return y.flip(1) if reverse else y, state


def _check_not_packed(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise ValueError("cu_seqlens: packed sequences cannot be exported; export a batch, and pad with attention_mask")


def _sigmoid(x: Tensor) -> Tensor:
    # ONNX Runtime's Sigmoid does not fall below e^-18
    return 1 / (1 + torch.exp(-x))


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return x * _sigmoid(x)
    return _sigmoid(x) if activation == "sigmoid" else x


def _log1p(x: Tensor) -> Tensor:
    # exporters write log(1 + x), which loses the digits of a small x; this quotient gives them back
    u = 1 + x
    near = torch.where(u == 1, 0.5, u)
    return torch.where(u == 1, x, near.log() * (x / (near - 1)))


def _expm1(x: Tensor) -> Tensor:
    # likewise exp(x) - 1; x is at most 0
    u = torch.exp(x)
    near = torch.where((u == 1) | (u < math.exp(-1)), 0.5, u)
    small = torch.where(u == 1, x, (near - 1) * (x / near.log()))
    return torch.where(u < math.exp(-1), u - 1, small)


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Rewrite the scans of an exported program in ordinary operations, or in LinearAttention.

    Raises:
        ValueError: packed sequences.
    """
    operators = [getattr(torch.ops.hgrn2, name).default for name in _OPERATORS]
    return program.run_decompositions({operator: _decomposition(operator) for operator in operators})


# those of hgrn2.ops.registration that a program for inference may hold
_OPERATORS = ("chunked_scan", "chunked_gated_scan", "triton_scan", "triton_step", "cuda_scan")


def _decomposition(operator: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that takes an operator's arguments and computes its results from simpler operators."""
    schema = operator._schema
    names = [argument.name for argument in schema.arguments]

    def decomposed(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        given = dict(zip(names, args, strict=False)) | kwargs
        is_step = "state" in given
        # without a key f is the gate's pre-activation, with one it is Triton's name for the log decay
        q, f, v = given["q"], given["f" if "f" in given else "log_f"], given["v"]
        if is_step:
            q, f, v = (x.unsqueeze(1) for x in (q, f, v))
        state = given["state" if is_step else "initial_state"]
        settings = (given.get("cu_seqlens"), given.get("reverse", False), given["scale"])
        if given.get("k") is not None:
            y, state = free_scan(q, given["k"], v, f, state, *settings)
        else:
            activations = given["q_activation"], given.get("v_activation", "none")
            floor = given.get("min_log_decay")
            y, state = tied_scan(q, f, v, given["lower_bound"], state, *settings, *activations, floor)
        # a backward pass is not exported, so the states kept for it are not needed
        kept = [q.new_zeros(0) for _ in schema.returns[2:]]
        return y.squeeze(1) if is_step else y, state, *kept

    return decomposed
