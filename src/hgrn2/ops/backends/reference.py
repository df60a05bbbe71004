"""The recurrence step by step: the oracle that tests compare every backend with.

It is slow and meant to be read. Autograd differentiates it. It is exact to rounding in the dtype of its inputs; tests
use float64.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.ops.backends.base import Backend
from hgrn2.ops.call import CallTraits, ScanCall, state_dtype
from hgrn2.ops.device import without_autocast
from hgrn2.ops.gates import activate
from hgrn2.ops.tiles import boundaries
from hgrn2.shapes import BHKV, BHV, BTHK, BTHV, NHKV


def activation(x: Tensor, name: str) -> Tensor:
    """Apply "silu", "sigmoid" or "none"."""
    return {"silu": functional.silu, "sigmoid": torch.sigmoid, "none": lambda t: t}[name](x)


def tied_gate(z: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the forget gate and the tied key from the gate's pre-activation (arXiv 2404.07904, eq. 3 and 6).

    Args:
        z: [..., H, K].
        lower_bound: [H, K] in [0, 1), or None for 0.

    Returns:
        f = beta + (1 - beta) sigmoid(z) and k = 1 - f = (1 - beta) sigmoid(-z), both like z.
    """
    open_, closed = _sigmoid(z), _sigmoid(-z)
    if lower_bound is None:
        return open_, closed
    lower_bound = lower_bound.to(z.dtype)
    # written so that the derivative by beta is sigmoid(-z) itself, not 1 - sigmoid(z)
    return open_ + lower_bound * closed, (1 - lower_bound) * closed


def floored(f: Tensor, min_log_decay: float | None) -> Tensor:
    """Return the decay of a forget gate f: f, but at least e^min_log_decay, where it has no gradient."""
    if min_log_decay is None:
        return f
    floor = math.exp(min_log_decay)
    return torch.where(f <= floor, floor, f)


def _sigmoid(x: Tensor) -> Tensor:
    # torch.sigmoid differentiates as y (1 - y), which is 0 once y rounds to 1; this form keeps the gradient's digits
    limit = math.log(torch.finfo(x.dtype).max) - 1
    return 1 / (1 + torch.exp(-x.clamp(-limit, limit)))


def recurrence(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    f: BTHK,
    state: NHKV,
    cu_seqlens: Tensor | None,
    reverse: bool,
    scale: float,
) -> tuple[BTHV, NHKV]:
    """Compute S_t = Diag(f_t) S_{t-1} + k_t v_t^T, y_t = scale * S_t^T q_t, one token after the other.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        f: [B, T, H, K], the decay.
        state: [N, H, K, V], the initial states.
        cu_seqlens: [N + 1] starts of packed sequences and the total length, or None.
        reverse: run from the last token of each sequence to its first.
        scale: factor of the outputs.

    Returns:
        y [B, T, H, V] and the final states [N, H, K, V].
    """
    if cu_seqlens is not None:
        bounds = boundaries(cu_seqlens, q.shape[1])
        pieces = [
            recurrence(q[:, a:b], k[:, a:b], v[:, a:b], f[:, a:b], state[n : n + 1], None, reverse, scale)
            for n, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
        if not pieces:
            return v.new_zeros(q.shape[:3] + v.shape[3:]), state
        return torch.cat([y for y, _ in pieces], 1), torch.cat([s for _, s in pieces], 0)
    steps = range(q.shape[1])
    outputs: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        state = f[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (q[:, t, :, :, None] * state).sum(-2))
    if reverse:
        outputs.reverse()
    y = torch.stack(outputs, 1) if outputs else q.new_zeros(q.shape[:3] + v.shape[3:])
    return y, state


class ReferenceBackend(Backend):
    """The recurrence, which torch differentiates to any order and in forward mode. "auto" never chooses it."""

    name = "reference"
    opaque = ()

    def rejects(self, traits: CallTraits) -> str | None:
        """Return None: it runs every call."""
        return None

    def forward(self, call: ScanCall, plan: int) -> tuple[Tensor, Tensor, None]:
        """Run the recurrence in the state dtype."""
        dtype, settings = state_dtype(call.q), call.settings
        q, v = activation(call.q.to(dtype), settings.q_activation), activation(call.v.to(dtype), settings.v_activation)
        if call.k is None:
            f, k = tied_gate(call.f.to(dtype), call.lower_bound)
            f = floored(f, settings.min_log_decay)
        else:
            f, k = torch.exp(call.f), call.k.to(dtype)
        state = call.q.new_zeros(call.state_shape(), dtype=dtype) if call.initial_state is None else call.initial_state
        y, state = recurrence(q, k, v, f, state, call.cu_seqlens, settings.reverse, settings.scale)
        return y.to(call.q.dtype), state, None

    def step(self, call: ScanCall, in_place: bool) -> tuple[Tensor, Tensor]:
        """Run one token."""
        return step_in_torch(call, in_place)


def step_in_torch(call: ScanCall, in_place: bool) -> tuple[BHV, BHKV]:
    """Run one token in a few element-wise operations, which torch differentiates.

    Args:
        call: q, f [B, H, K], v [B, H, V], lower_bound and initial_state [B, H, K, V].
        in_place: write the new state over the initial one.
    """
    q, settings, old_state = call.q, call.settings, call.initial_state
    assert old_state is not None
    dtype = state_dtype(q)
    gate, key = tied_gate(call.f.to(dtype), call.lower_bound)
    value = activate(call.v.to(dtype), settings.v_activation)
    query = activate(q.to(dtype), settings.q_activation)
    state = torch.addcmul(key.unsqueeze(-1) * value.unsqueeze(-2), gate.unsqueeze(-1), old_state)
    with without_autocast(q):
        y = torch.matmul(query.unsqueeze(-2), state).squeeze(-2)
    if in_place:
        state = old_state.copy_(state)
    return (y * settings.scale if settings.scale != 1 else y).to(q.dtype), state
