"""Forget gates in (-1, 1), and the recurrence on outer products with decays of either sign."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.nn.mixers.base import wide_dtype
from hgrn2.nn.mixers.context import Context
from hgrn2.nn.mixers.outer_product import bounded_log_sigmoid
from hgrn2.ops import gated_scan
from hgrn2.shapes import BTHK, BTHV, NHKV

# smallest magnitude of a gate; below it, the gradient of the logarithm is not finite
SMALLEST_GATE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Decays(NamedTuple):
    """Forget gates f by magnitude and sign.

    Attributes:
        log_size: log |f|, [B, T, H, K] in the dtype of the state, at most 0.
        negative: bool [B, T, H, K], True where f is negative; None if all are positive.
    """

    log_size: BTHK
    negative: BTHK | None


class Operands(NamedTuple):
    """Operands of `scan_with_signs`.

    Attributes:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        decays: [B, T, H, K]; 1, with a key of 0, where a token is padding.
    """

    q: BTHK
    k: BTHK
    v: BTHV
    decays: Decays


def positive_gate(z: Tensor, bound: Tensor | None) -> tuple[Tensor, Decays]:
    """Compute the tied key 1 - f and f = beta + (1 - beta) sigmoid(z); arguments of `signed_gate`."""
    z = z.to(wide_dtype(z.dtype))
    if bound is None:
        return torch.sigmoid(-z), Decays(functional.logsigmoid(z), None)
    bound = bound.to(z.dtype)
    return (1 - bound) * torch.sigmoid(-z), Decays(bounded_log_sigmoid(z, bound), None)


def signed_gate(z: Tensor, bound: Tensor | None) -> tuple[Tensor, Decays]:
    """Compute forget gates that may be negative, and their tied keys.

    With g = beta + (1 - beta) sigmoid(z), the gate is f = 2 g - 1 in [2 beta - 1, 1) (arXiv 2411.12537, section 4, on
    Mamba), and the key stays 1 - f, here 2 (1 - g) in (0, 2 - 2 beta]. DeltaNet's key is tied in the same way there:
    with the eigenvalue 1 - b of its transition it writes b times a value, and b in (0, 2) makes it negative. A lower
    bound of at least 1/2 leaves only positive gates.

    A gate closer to 0 than `SMALLEST_GATE` counts as `SMALLEST_GATE`, without a gradient through the decay.

    Args:
        z: [..., D], pre-activation of the gate.
        bound: [D] in [0, 1), beta; None for 0.

    Returns:
        k = 1 - f and the decays f, all [..., D]; k and log |f| are float32 or wider.
    """
    z = z.to(wide_dtype(z.dtype))
    lost = 2 * torch.sigmoid(-z) if bound is None else 2 * (1 - bound.to(z.dtype)) * torch.sigmoid(-z)
    # the clamps keep both branches finite, so that the gradients are finite
    near_one = torch.log1p(-lost.clamp_max(0.5))
    log_size = torch.where(lost < 0.5, near_one, (1 - lost).abs().clamp_min(SMALLEST_GATE[z.dtype]).log())
    return lost, Decays(log_size, lost > 1)


def scan_with_signs(
    operands: Operands,
    state: NHKV | None,
    context: Context,
    *,
    scale: float = 1.0,
    backend: str = "auto",
    reverse: bool = False,
) -> tuple[BTHV, NHKV]:
    """Run the recurrence with decays of either sign by `hgrn2.ops.gated_scan`, in any of its backends.

        S_t = Diag(f_t) S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t        f_t = +- exp(log_size_t)

    With s_t the product of the signs of f up to token t, R_t = Diag(s_t) S_t follows the same recurrence with decays
    |f_t| and keys s_t k_t, and is read by s_t q_t. Signs are exact, so nothing is lost. They are counted over the whole
    row; the sign before a packed sequence goes into its initial state.

    Args:
        operands: query, key, value and decays of every token.
        state: [N, H, K, V] before the first token, float32 or wider; None at the start of a sequence.
        context: further inputs of the pass.
        scale: factor of the outputs.
        backend: name of the operator's backend, or "auto".
        reverse: run from the last token of each sequence to its first.

    Returns:
        y [B, T, H, V] in q's dtype, and the state after the last token.
    """
    if context.is_step and state is not None:
        return _step(operands, state, scale)
    q, k, v, (log_size, negative) = operands
    bounds = context.cu_seqlens
    if negative is None:
        return gated_scan(
            q, k, v, log_size, initial_state=state, cu_seqlens=bounds, reverse=reverse, scale=scale, backend=backend
        )
    flips = torch.cat([negative.new_zeros((negative.shape[0], 1, *negative.shape[2:])), negative], 1)
    # the sign of the product of the first t decays, t = 0 .. T; reversed, token t reads it before its own decay
    signs = 1 - 2 * (flips.cumsum(1, dtype=torch.int32) & 1).to(q.dtype)
    own = signs[:, :-1] if reverse else signs[:, 1:]
    if bounds is None:
        first, last = signs[:, 0], signs[:, -1]
    else:
        first, last = (signs[0].index_select(0, places.long()) for places in (bounds[:-1], bounds[1:]))
    if reverse:
        first, last = last, first
    if state is not None:
        state = state * first.unsqueeze(-1).to(state.dtype)
    y, end = gated_scan(
        q * own, k * own, v, log_size, initial_state=state, cu_seqlens=bounds, reverse=reverse, scale=scale,
        backend=backend,
    )  # fmt: skip
    return y, end * last.unsqueeze(-1).to(end.dtype)


def _step(operands: Operands, state: NHKV, scale: float) -> tuple[BTHV, NHKV]:
    q, k, v, decays = operands
    decay = decays.log_size.squeeze(1).exp()
    if decays.negative is not None:
        decay = torch.where(decays.negative.squeeze(1), -decay, decay)
    written = k.squeeze(1).unsqueeze(-1).to(state.dtype) * v.squeeze(1).unsqueeze(-2)
    state = torch.addcmul(written, decay.unsqueeze(-1), state)
    y = (scale * q.squeeze(1).to(state.dtype)).unsqueeze(-2) @ state
    return y.transpose(1, 2).to(q.dtype), state
