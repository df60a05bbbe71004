"""The public operators: each checks its arguments, chooses a backend and runs the call."""

from __future__ import annotations

from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.ops.backends.base import choose
from hgrn2.ops.call import ScanCall, ScanSettings, state_dtype, traits_of
from hgrn2.ops.checks import check_log_decay, check_lower_bound, check_scan, check_settings, check_step
from hgrn2.ops.export import is_onnx_export, scan_in_operations
from hgrn2.ops.registration import run_scan, run_step
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
    """Run the recurrence of HGRN2 from pre-activations (arXiv 2404.07904, section 3).

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
        cu_seqlens: [N + 1], int32 or int64, for sequences packed end to end with B = 1: the first row of each, and T.
        reverse: run from the last token to the first.
        scale: factor of the outputs.
        q_activation: "silu", "sigmoid" or "none", applied to q.
        v_activation: "none" or "silu", applied to v.
        min_log_decay: lower limit, in [-69, 0), of the log decay: S_{t-1} is multiplied by the larger of F_t and
            e^min_log_decay, and k_t stays 1 - F_t. The authors train with -3 (their code; the paper has none). GPU
            kernels are compiled for each value.
        backend: "auto", "cuda" (kernels for Hopper GPUs: bfloat16 or float16, K = V = 128), "triton" (kernels for any
            NVIDIA GPU), "narrow" (those for K and V of at most 16), "chunked" (plain torch on any device) or
            "reference" (step by step). All are exact for any gate.
        debug: check values on an accelerator too, which synchronises; on a CPU they are always checked. Without it,
            cu_seqlens that do not increase from 0 to T give rows of zeros, or rows of another sequence.

    Returns:
        y [B, T, H, V] in q's dtype, and the final state [N, H, K, V] in the state's dtype.

    Raises:
        UserError: a shape, dtype, device, setting, or value of cu_seqlens or the lower bound is invalid. Values of
            tensors are checked only where that does not synchronise with an accelerator.
        NotImplementedError: forward-mode differentiation through a backend other than "reference".
        RuntimeError: a second derivative through a backend other than "reference", when it is computed.

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
    settings = ScanSettings(
        reverse, float(scale), q_activation, v_activation, None if min_log_decay is None else float(min_log_decay)
    )
    state = _to_state_dtype(initial_state, q)
    call = ScanCall(q, f, None, v, _to_state_dtype(lower_bound, q), state, cu_seqlens, settings)
    if is_onnx_export():
        return scan_in_operations(call)
    return run_scan(call, choose(backend, traits_of(call)))


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
    """Run the recurrence of `hgrn2_scan` with a separate key and the logarithm of the decay.

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
        backend: "auto", "triton", "narrow", "chunked" or "reference", as in `hgrn2_scan`; "cuda" has no kernels for it.
        debug: check values on an accelerator too, which synchronises.

    Returns:
        y [B, T, H, V] in q's dtype, and the final state [N, H, K, V].

    Raises:
        UserError: as `hgrn2_scan`, like the other errors; and for a log_f above 0 on the CPU.

    Example:
        >>> import torch, hgrn2
        >>> q, k, v = torch.randn(3, 1, 50, 2, 16).unbind(0)
        >>> y, state = hgrn2.ops.gated_scan(q, k, v, -torch.rand(1, 50, 2, 16))
    """
    check_scan(q, k, v, initial_state, cu_seqlens, "k", debug)
    check_settings(q, scale, reverse=reverse)
    check_log_decay(log_f, q, debug)
    state = _to_state_dtype(initial_state, q)
    settings = ScanSettings(reverse, float(scale))
    call = ScanCall(q, log_f.to(state_dtype(q)), k, v, None, state, cu_seqlens, settings)
    if is_onnx_export():
        return scan_in_operations(call)
    return run_scan(call, choose(backend, traits_of(call)))


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
    """Run one token of `hgrn2_scan`, for decoding with a state of constant size; min_log_decay is only for training.

    Args:
        q: [B, H, K], pre-activation of the output gate.
        f: [B, H, K], pre-activation of the forget gate.
        v: [B, H, V].
        state: [B, H, K, V], float32 (float64 for float64 inputs); changed only if `inplace`.
        lower_bound: [H, K], float32 in [0, 1); None means 0.
        scale: factor of the outputs.
        q_activation: "silu", "sigmoid" or "none", applied to q.
        v_activation: "none" or "silu", applied to v.
        inplace: write the new state over `state`, which saves memory and keeps the address, as captured graphs need.
        backend: "auto", "cuda", "triton", "narrow", "chunked" or "reference". "cuda" and "triton" run the same Triton
            kernel; "narrow", and without Triton all backends, run the same few element-wise operations.
        debug: check values on an accelerator too, which synchronises.

    Returns:
        y [B, H, V] in q's dtype, and the new state.

    Raises:
        UserError: as `hgrn2_scan`.

    Example:
        >>> import torch, hgrn2
        >>> q, f, v = torch.randn(3, 1, 4, 32).unbind(0)
        >>> y, state = hgrn2.ops.hgrn2_step(q, f, v, torch.zeros(1, 4, 32, 32))
    """
    check_step(q, f, v, state)
    check_settings(q, scale, q_activation=q_activation, v_activation=v_activation)
    check_lower_bound(lower_bound, q, debug)
    settings = ScanSettings(False, float(scale), q_activation, v_activation)
    call = ScanCall(q, f, None, v, _to_state_dtype(lower_bound, q), _to_state_dtype(state, q), None, settings)
    chosen = choose("chunked" if is_onnx_export() else backend, traits_of(call, is_step=True))
    if inplace and state.dtype != state_dtype(q):
        raise UserError(f"state has dtype {state.dtype}; wanted {state_dtype(q)} for inplace=True")
    if inplace and call.needs_gradient():
        raise UserError(
            "a state cannot be changed in place where gradients are recorded; use torch.no_grad()", "contradiction"
        )
    return run_step(call, chosen, inplace)


def _to_state_dtype(x: Tensor | None, q: Tensor) -> Tensor | None:
    return None if x is None else x.to(state_dtype(q))
