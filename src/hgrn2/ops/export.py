"""Scans in operations that every exporter supports: element-wise ones, a matrix product and a loop over tokens.

Other runtimes do not have the operators of this package, so programs for them are traced through these functions. They
are as exact as the backends for any gate. They loop over tokens because the joins of `hgrn2.ops.backends.chunked` are
200 operations per scan, for which the exporter takes ten seconds per layer.

ONNX has an operator for this recurrence, LinearAttention, which `use_linear_attention` enables.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.ops.backends.chunked.joins import COMPLEMENT_BELOW
from hgrn2.ops.call import ScanCall, state_dtype
from hgrn2.ops.gates import Floor
from hgrn2.ops.tracing import constant_in_traces

# domains that define LinearAttention: the standard's and ONNX Runtime's own
STANDARD = "ai.onnx"
LINEAR_ATTENTION = (STANDARD, "com.microsoft")

_linear_attention: ContextVar[str | None] = ContextVar("linear_attention", default=None)


def is_exporting() -> bool:
    """Return whether the call is being traced by `torch.export` or `torch.onnx.export`."""
    # torch.compiler.is_exporting() is true under torch.compile as well, up to torch 2.11 at least
    return torch.compiler._is_exporting_flag


def is_onnx_export() -> bool:
    """Return whether the call is being traced by `torch.onnx.export`."""
    return is_exporting() and _is_in_onnx_export()


# torch.compile would trace it as false
@constant_in_traces
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def refuse_onnx(operator: str) -> None:
    """Refuse an operator that has no form in ordinary operations.

    Args:
        operator: its name.

    Raises:
        UserError: `torch.onnx.export` is tracing.
    """
    if is_onnx_export():
        raise UserError(
            f"{operator} cannot be written to ONNX, and with it no model of hgrn1, griffin or mamba layers; use "
            "torch.export, or mixers with outer-product states",
            "unsupported",
        )


@contextlib.contextmanager
def use_linear_attention(domain: str | None) -> Iterator[None]:
    """Trace scans inside the block as ONNX's LinearAttention of a domain, or as ordinary operations.

    Args:
        domain: "ai.onnx", "com.microsoft" or None.
    """
    token = _linear_attention.set(domain)
    try:
        yield
    finally:
        _linear_attention.reset(token)


def scan_in_operations(call: ScanCall) -> tuple[Tensor, Tensor]:
    """Run a scan of either operator.

    Args:
        call: a checked call.

    Returns:
        y [B, T, H, V] and the final state [N, H, K, V].
    """
    if call.cu_seqlens is not None:
        raise UserError(
            "cu_seqlens: packed sequences cannot be exported; export a batch, and pad with attention_mask",
            "unsupported",
        )
    operands = _tied_operands(call) if call.k is None else _free_operands(call)
    y, state = _scan(operands, call) if _linear_attention.get() is None else _onnx_scan(operands, call)
    return y.to(call.q.dtype), state


class _Operands(NamedTuple):
    """Operands of the recurrence in the state dtype: q, k and v activated, the decay f and its complement c = 1 - f."""

    q: Tensor
    k: Tensor
    v: Tensor
    f: Tensor
    c: Tensor
    log_f: Tensor | None = None


def _tied_operands(call: ScanCall) -> _Operands:
    dtype, settings = state_dtype(call.q), call.settings
    z = call.f.to(dtype)
    f, k = _sigmoid(z), _sigmoid(-z)
    if call.lower_bound is not None:
        bound = call.lower_bound.to(dtype)
        f, k = f + bound * k, (1 - bound) * k
    c, floor = k, Floor.of(settings.min_log_decay)
    if floor.decay:
        f, c = f.clamp(min=floor.decay), k.clamp(max=floor.lost)
    q, v = _activate(call.q.to(dtype), settings.q_activation), _activate(call.v.to(dtype), settings.v_activation)
    return _Operands(q, k, v, f, c)


def _free_operands(call: ScanCall) -> _Operands:
    assert call.k is not None
    q, k, v = (x.to(state_dtype(call.q)) for x in (call.q, call.k, call.v))
    return _Operands(q, k, v, call.f.exp(), -_expm1(call.f), call.f)


def _scan(operands: _Operands, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Run a scan token by token."""
    # private, though exporters know it. Its public wrapper `scan` compiles, which fails where a trace has proved two
    # lengths equal
    from torch._higher_order_ops.scan import scan_op

    q, k, v, f, c, _ = operands
    state, reverse = _initial_state(operands, call), call.settings.reverse
    # near 1 a decay has fewer digits than its complement, and the rounding errors of equal gates add up
    is_small = c < COMPLEMENT_BELOW
    keep, change = is_small.to(f.dtype), torch.where(is_small, -c, f)
    rows = [x.unsqueeze(-2) for x in (q * call.settings.scale, v)] + [x.unsqueeze(-1) for x in (k, keep, change)]
    rows = [x.flip(1).transpose(0, 1) if reverse else x.transpose(0, 1) for x in rows]  # [T, B, H, 1, K], [.., K, 1]
    # detached: otherwise torch would prepare a backward pass
    results: Any = scan_op(_token, [state.detach()], [x.detach() for x in rows], ())
    end, y = results
    y = y.squeeze(-2).transpose(0, 1)
    return y.flip(1) if reverse else y, end


def _token(state: Tensor, q: Tensor, v: Tensor, k: Tensor, keep: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    state = k * v + change * state + keep * state
    return state, q @ state


def _onnx_scan(operands: _Operands, call: ScanCall) -> tuple[Tensor, Tensor]:
    """Run a scan as ONNX's LinearAttention with the update rule "gated"."""
    q, k, v, f, c, log_f = operands
    if q.dtype != torch.float32:
        raise UserError(
            f"q has dtype {q.dtype}; LinearAttention's runtimes take float32, leave linear_attention out", "unsupported"
        )
    if log_f is None:
        log_f = torch.where(c < COMPLEMENT_BELOW, _log1p(-c), f.log())
    state, reverse, heads = _initial_state(operands, call), call.settings.reverse, q.shape[2]
    # scaled here: the operator reads a scale of 0 as one by the width
    inputs = [x.flip(1) if reverse else x for x in (q * call.settings.scale, k, v, log_f)]
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


def _initial_state(operands: _Operands, call: ScanCall) -> Tensor:
    return operands.q.new_zeros(call.state_shape()) if call.initial_state is None else call.initial_state


def _sigmoid(x: Tensor) -> Tensor:
    # ONNX Runtime's Sigmoid never falls below e^-18
    return 1 / (1 + torch.exp(-x))


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return x * _sigmoid(x)
    return _sigmoid(x) if activation == "sigmoid" else x


def _log1p(x: Tensor) -> Tensor:
    # exporters write log(1 + x), which loses the digits of a small x; this quotient restores them
    u = 1 + x
    near = torch.where(u == 1, 0.5, u)
    return torch.where(u == 1, x, near.log() * (x / (near - 1)))


def _expm1(x: Tensor) -> Tensor:
    # exporters write exp(x) - 1, which has the same problem; x is at most 0
    u = torch.exp(x)
    near = torch.where((u == 1) | (u < math.exp(-1)), 0.5, u)
    small = torch.where(u == 1, x, (near - 1) * (x / near.log()))
    return torch.where(u < math.exp(-1), u - 1, small)


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Rewrite the scans of an exported program in ordinary operations, or in LinearAttention.

    Raises:
        UserError: packed sequences.
    """
    operators = [torch.ops.hgrn2.scan.default, torch.ops.hgrn2.step.default]
    return program.run_decompositions({operator: _decomposition(operator) for operator in operators})


def _decomposition(operator: Any) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that takes an operator's arguments and computes its results from simpler operators."""
    names = [argument.name for argument in operator._schema.arguments]
    is_step = "plan" not in names

    def decomposed(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        given = dict(zip(names, args, strict=False)) | kwargs
        call = ScanCall.from_flat([given[name] for name in names if name not in ("backend", "plan")])
        if not is_step:
            # no backward pass is exported, so nothing is kept for it
            return *scan_in_operations(call), call.q.new_zeros(0)
        token = call._replace(q=call.q.unsqueeze(1), f=call.f.unsqueeze(1), v=call.v.unsqueeze(1))
        y, state = scan_in_operations(token)
        return y.squeeze(1), state

    return decomposed
