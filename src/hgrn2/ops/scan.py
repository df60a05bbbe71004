"""The public operators, and which backend runs."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from hgrn2.ops import reference
from hgrn2.ops.backends import resolve_backend, triton_runs
from hgrn2.ops.checks import (
    check_log_decay,
    check_lower_bound,
    check_scan,
    check_settings,
    check_step,
    check_tangents,
    state_dtype,
)
from hgrn2.ops.cuda.plan import coarse_chunks
from hgrn2.ops.export import free_scan, is_exporting, is_onnx_export, tied_scan
from hgrn2.ops.gates import activate
from hgrn2.ops.registration import (
    chunked_gated_scan,
    chunked_scan,
    cuda_scan,
    triton_scan,
    triton_step,
    triton_step_in_place,
)
from hgrn2.ops.tiles import chunks_per_tile
from hgrn2.shapes import BHK, BHKV, BHV, BTHK, BTHV, HK, NHKV


def hgrn2_scan(
    q: BTHK,
    f: BTHK,
    v: BTHV,
    lower_bound: HK | None = None,
    *,
    initial_state: NHKV | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    q_activation: str = "silu",
    v_activation: str = "none",
    min_log_decay: float | None = None,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[BTHV, NHKV]:
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
        min_log_decay: a floor, in [-69, 0), under the decay's logarithm: S_{t-1} is multiplied by the larger of F_t and
            e^min_log_decay, and k_t stays 1 - F_t. The authors train with -3 (their code; the paper has none). GPU
            kernels are compiled for each value.
        backend: "auto", "cuda" (kernels for Hopper GPUs: bfloat16 or float16, K = V = 128), "triton" (kernels for any
            GPU of NVIDIA), "chunked" (plain torch on any device) or "reference" (step by step). All are exact for any
            gate.
        debug: check values on an accelerator too, which waits for it; on a CPU they always are. Without it cu_seqlens
            that do not rise from 0 to T give rows of zeros, or rows that belong to another sequence.

    Returns:
        y [B, T, H, V] in q's dtype, and the final state [N, H, K, V] in the state's dtype.

    Raises:
        ValueError: shapes, dtypes, devices, settings, values of cu_seqlens or of the lower bound that do not fit;
            values of tensors are checked where that needs no wait for an accelerator.
        NotImplementedError: a derivative in forward mode is asked of another backend than "reference".
        RuntimeError: likewise a second derivative, where it is computed.

    Example:
        >>> import torch, hgrn2
        >>> q, f, v = torch.randn(3, 2, 100, 4, 32).unbind(0)
        >>> y, state = hgrn2.ops.hgrn2_scan(q, f, v, torch.full((4, 32), 0.5))
        >>> y.shape, state.shape
        (torch.Size([2, 100, 4, 32]), torch.Size([2, 4, 32, 32]))
    """
    check_scan(q, f, v, initial_state, cu_seqlens, "f", debug)
    check_settings(
        q, scale, reverse=reverse, min_log_decay=min_log_decay, q_activation=q_activation, v_activation=v_activation
    )
    check_lower_bound(lower_bound, q, debug)
    lower_bound, initial_state = _as_state(lower_bound, q), _as_state(initial_state, q)
    if is_onnx_export():
        return tied_scan(
            q, f, v, lower_bound, initial_state, cu_seqlens, reverse, float(scale), q_activation, v_activation,
            min_log_decay,
        )  # fmt: skip
    # a launch takes no larger batch
    plain = q.shape[0] < 1 << 16
    backend = _resolve(backend, q, v, plain)
    check_tangents(backend, q, f, v, lower_bound, initial_state)
    min_log_decay = None if min_log_decay is None else float(min_log_decay)
    if backend == "cuda":
        # rounded as every product of its kernels would
        v = activate(v, v_activation)
        keep = _keeps_states(q, f, v, lower_bound, initial_state) and q.dtype == torch.bfloat16
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
        dtype = state_dtype(q)
        gate, key = reference.tied_gate(f.to(dtype), lower_bound)
        gate = reference.floored(gate, min_log_decay)
        y, state = reference.recurrence(
            reference.activation(q.to(dtype), q_activation), key, reference.activation(v.to(dtype), v_activation), gate,
            _initial_state(initial_state, q, v, cu_seqlens), cu_seqlens, reverse, scale,
        )  # fmt: skip
        return y.to(q.dtype), state
    keep = _keeps_states(q, f, v, lower_bound, initial_state)
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
    q: BTHK,
    k: BTHK,
    v: BTHV,
    log_f: BTHK,
    *,
    initial_state: NHKV | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    scale: float = 1.0,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[BTHV, NHKV]:
    """Runs the recurrence of `hgrn2_scan` with a key of its own and the decay given as its logarithm.

        S_t = Diag(exp(log_f_t)) S_{t-1} + k_t v_t^T        y_t = scale * S_t^T q_t

    Args:
        q: [B, T, H, K]. Any strides.
        k: [B, T, H, K].
        v: [B, T, H, V].
        log_f: [B, T, H, K], float32 (float64 for float64 inputs), at most 0; -inf is a full reset.
        initial_state: [N, H, K, V], float32 (float64 for float64 inputs); None means zeros.
        cu_seqlens: [N + 1], int32 or int64: bounds of packed sequences, B = 1.
        reverse: run from the last token to the first.
        scale: factor of the outputs.
        backend: "auto", "triton", "chunked" or "reference", as for `hgrn2_scan`; "cuda" has no kernels for it.
        debug: check values on an accelerator too, which waits for it.

    Returns:
        y [B, T, H, V] in q's dtype, and the final state [N, H, K, V].

    Raises:
        ValueError: as `hgrn2_scan`, like the other errors; and for a log_f above 0 on the CPU.

    Example:
        >>> import torch, hgrn2
        >>> q, k, v = torch.randn(3, 1, 50, 2, 16).unbind(0)
        >>> y, state = hgrn2.ops.gated_scan(q, k, v, -torch.rand(1, 50, 2, 16))
    """
    check_scan(q, k, v, initial_state, cu_seqlens, "k", debug)
    check_settings(q, scale, reverse=reverse)
    check_log_decay(log_f, q, debug)
    log_f, initial_state = log_f.to(state_dtype(q)), _as_state(initial_state, q)
    if is_onnx_export():
        return free_scan(q, k, v, log_f, initial_state, cu_seqlens, reverse, float(scale))
    backend = _resolve(backend, q, v, plain=False)
    check_tangents(backend, q, k, v, log_f, initial_state)
    if backend == "triton":
        return triton_scan(q, log_f, k, v, None, initial_state, cu_seqlens, reverse, float(scale), "none", "none", None)
    if backend == "reference":
        dtype = state_dtype(q)
        state = _initial_state(initial_state, q, v, cu_seqlens)
        operands = (q.to(dtype), k.to(dtype), v.to(dtype), torch.exp(log_f))
        y, state = reference.recurrence(*operands, state, cu_seqlens, reverse, scale)
        return y.to(q.dtype), state
    keep = _keeps_states(q, k, v, log_f, initial_state)
    tile_chunks = chunks_per_tile(q.shape[2], max(q.shape[3], v.shape[3]), q.dtype, q.device)
    y, state, _ = chunked_gated_scan(
        q, k, v, log_f, initial_state, cu_seqlens, reverse, float(scale), tile_chunks, keep
    )
    return y, state


def hgrn2_step(
    q: BHK,
    f: BHK,
    v: BHV,
    state: BHKV,
    lower_bound: HK | None = None,
    *,
    scale: float = 1.0,
    q_activation: str = "silu",
    v_activation: str = "none",
    inplace: bool = False,
    backend: str = "auto",
    debug: bool = False,
) -> tuple[BHV, BHKV]:
    """Runs one token of `hgrn2_scan`, for decoding with a state of constant size; a floor is for training, not here.

    Args:
        q: [B, H, K], pre-activation of the output gate.
        f: [B, H, K], pre-activation of the forget gate.
        v: [B, H, V].
        state: [B, H, K, V], float32 (float64 for float64 inputs); changed only if `inplace`.
        lower_bound: [H, K], float32 in [0, 1); None means 0.
        scale: factor of the outputs.
        q_activation: "silu", "sigmoid" or "none", applied to q.
        v_activation: "none" or "silu", applied to v.
        inplace: write the new state over `state`, which saves its memory and, in a captured graph, its address.
        backend: "auto", "cuda", "triton", "chunked" or "reference". "cuda" and "triton" are one kernel, Triton's;
            without Triton all run the same few element-wise operations.
        debug: check values on an accelerator too, which waits for it.

    Returns:
        y [B, H, V] in q's dtype, and the new state.

    Raises:
        ValueError: as `hgrn2_scan`.

    Example:
        >>> import torch, hgrn2
        >>> q, f, v = torch.randn(3, 1, 4, 32).unbind(0)
        >>> y, state = hgrn2.ops.hgrn2_step(q, f, v, torch.zeros(1, 4, 32, 32))
    """
    check_step(q, f, v, state)
    check_settings(q, scale, q_activation=q_activation, v_activation=v_activation)
    check_lower_bound(lower_bound, q, debug)
    dtype = state_dtype(q)
    if is_onnx_export():
        backend = "chunked"
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
        check_tangents(backend, q, f, v, state, lower_bound)
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


def _resolve(backend: str, q: Tensor, v: Tensor, plain: bool) -> str:
    return resolve_backend(backend, q.device, q.dtype, q.shape[-1], v.shape[-1], plain)


def _as_state(x: Tensor | None, q: Tensor) -> Tensor | None:
    return None if x is None else x.to(state_dtype(q))


def _needs_gradient(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _keeps_states(*inputs: Tensor | None) -> bool:
    """Whether the forward pass keeps states for the backward pass, which otherwise computes them again."""
    # how many there are depends on the length, which an exported program leaves open
    return _needs_gradient(*inputs) and not is_exporting()


def _initial_state(initial_state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if initial_state is not None:
        return initial_state
    num_states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros((num_states, *q.shape[2:], v.shape[3]), dtype=state_dtype(q))
