"""The recurrence on outer products with a free key, as mixers call it: a scan, or one step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hgrn2.nn.mixers.base import Context
from hgrn2.nn.token_shift import token_shift
from hgrn2.ops import gated_scan
from hgrn2.ops.pieces import state_before
from hgrn2.ops.tiles import CHUNK_SIZE
from hgrn2.shapes import BT, BTHK, BTHV, NHKV


def mix_outer_products(
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_f: BTHK,
    state: NHKV | None,
    context: Context,
    *,
    scale: float = 1.0,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[BTHV, NHKV]:
    """Run `hgrn2.ops.gated_scan`, or for one token after a state its step in element-wise operations.

        S_t = Diag(exp(log_f_t)) S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

    A padded token leaves the state as it is if its key and its log decay are 0, see `pass_over_padding`.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_f: [B, T, H, K] in the dtype of the state, at most 0.
        state: [N, H, K, V] before the first token, float32 or wider; None at the start of a sequence.
        context: further inputs of the pass.
        scale: factor of the outputs.
        reverse: run from the last token of each sequence to its first.
        backend: name of the operator's backend, or "auto".

    Returns:
        y [B, T, H, V] in q's dtype, and the state after the last token.
    """
    if context.pieces is not None:
        state = state_before(k, v, log_f, context.cu_seqlens, context.pieces)
    if not context.is_step or state is None:
        return gated_scan(
            q, k, v, log_f, initial_state=state, cu_seqlens=context.cu_seqlens, reverse=reverse, scale=scale,
            backend=backend,
        )  # fmt: skip
    written = k.squeeze(1).unsqueeze(-1).to(state.dtype) * v.squeeze(1).unsqueeze(-2)
    state = torch.addcmul(written, log_f.squeeze(1).exp().unsqueeze(-1), state)
    y = (scale * q.squeeze(1).to(state.dtype)).unsqueeze(-2) @ state
    return y.transpose(1, 2).to(q.dtype), state


def pass_over_padding(k: BTHK, log_f: BTHK, mask: BT | None) -> tuple[BTHK, BTHK]:
    """Return keys and log decays that are 0 at padding, so that it leaves the state as it is.

    Args:
        k: [B, T, H, K].
        log_f: [B, T, H, K].
        mask: [B, T] bool, False at padding, or None.
    """
    if mask is None:
        return k, log_f
    padding = ~mask[..., None, None]
    return k.masked_fill(padding, 0), log_f.masked_fill(padding, 0)


def read_before_writing(
    r: BTHK, k: BTHK, v: BTHV, log_w: BTHK, state: NHKV | None, context: Context, backend: str = "auto"
) -> tuple[BTHV, NHKV]:
    """Return y_t = r_t S_{t-1} and the last state, with S_t = diag(exp(log_w_t)) S_{t-1} + k_t^T v_t.

    A scan reads after it writes. Therefore token t reads with the query of token t + 1, and the outputs move on by one
    token; the first output of a sequence is read from its initial state. Nothing is divided by a decay.

    Args:
        r: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_w: [B, T, H, K] in the dtype of the state.
        state: [N, H, K, V] before the first token; None at the start of a sequence.
        context: further inputs of the pass.
        backend: name of the operator's backend, or "auto".
    """
    k, log_w = pass_over_padding(k, log_w, context.mask)
    y, end = mix_outer_products(r.roll(-1, 1), k, v, log_w, state, context, backend=backend)
    first = None
    if state is not None and r.shape[1]:
        bounds = context.cu_seqlens
        heads = r[:, 0] if bounds is None else r[0].index_select(0, bounds[:-1].long().clamp(max=r.shape[1] - 1))
        first = (heads.to(state.dtype).unsqueeze(-2) @ state).flatten(1)
    return token_shift(y.flatten(2), first, context.cu_seqlens)[0].unflatten(2, y.shape[2:]), end


def outer_product_flops(num_heads: int, k_width: int, v_width: int) -> int:
    """Return the multiplications and additions per token of a scan in whole chunks: scores, values, reads and updates.

    Args:
        num_heads: H.
        k_width: K.
        v_width: V.
    """
    per_head = (CHUNK_SIZE + 1) * k_width + 2 * CHUNK_SIZE * v_width + 4 * k_width * v_width
    # each merge of two blocks multiplies one query or key row by a decay, and their decays
    return num_heads * (per_head + round(k_width * math.log2(CHUNK_SIZE)))


def bounded_log_sigmoid(z: Tensor, bound: Tensor) -> Tensor:
    """Return log(bound + (1 - bound) sigmoid(z)), with a small relative error close to 0 as well.

    Args:
        z: [..., D], float32 or wider.
        bound: [D] in [0, 1).
    """
    free = 1 - bound
    lost = free * torch.sigmoid(-z)
    # the clamps keep the branch that is not taken finite, and with it the gradients
    kept = bound + free * torch.sigmoid(z.clamp_min(-80))
    return torch.where(lost < 0.5, torch.log1p(-lost.clamp_max(0.5)), kept.log())
