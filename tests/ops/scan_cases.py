"""Inputs for the operator's tests, ordinary and extreme, and honest torch in low precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hgrn2.ops import gated_scan, hgrn2_scan
from hgrn2.ops.backends import find
from hgrn2.ops.backends.reference import activation
from hgrn2.ops.call import ScanCall, ScanSettings
from hgrn2.ops.registration import run_scan
from tests.numerics import run

BY_TOKEN = ("q", "f", "k", "v", "log_f")
LENGTHS = (0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 200)


def tied_inputs(
    batch: int = 2,
    length: int = 100,
    heads: int = 2,
    k_width: int = 6,
    v_width: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    bound: float | None = 0.9,
    cu_seqlens: list[int] | None = None,
    state: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs of `hgrn2_scan` by name; lower bounds are uniform in [0, bound)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    num_states = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state_dtype = torch.promote_types(dtype, torch.float32)
    return {
        "q": normal(batch, length, heads, k_width).to(dtype),
        "f": (2 * normal(batch, length, heads, k_width) + 1).to(dtype),
        "v": normal(batch, length, heads, v_width).to(dtype),
        "lower_bound": None
        if bound is None
        else (bound * torch.rand(heads, k_width, generator=generator, dtype=torch.float64)).to(state_dtype),
        "initial_state": normal(num_states, heads, k_width, v_width).to(state_dtype) if state else None,
        "cu_seqlens": None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32),
    }


def free_inputs(
    batch: int = 2,
    length: int = 100,
    heads: int = 2,
    k_width: int = 6,
    v_width: int = 5,
    *,
    dtype: torch.dtype = torch.float32,
    cu_seqlens: list[int] | None = None,
    state: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs of `gated_scan` by name."""
    inputs = tied_inputs(
        batch, length, heads, k_width, v_width, dtype=dtype, bound=None, cu_seqlens=cu_seqlens, state=state, seed=seed
    )
    del inputs["lower_bound"]
    z = inputs.pop("f")
    state_dtype = torch.promote_types(dtype, torch.float32)
    return inputs | {"k": torch.tanh(z).flip(1), "log_f": torch.nn.functional.logsigmoid(z.to(state_dtype))}


def unchecked(op: Callable[..., Any], backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """An operator with its default settings on inputs whose values nothing has checked, as on a GPU."""

    def scan(q, v, initial_state, cu_seqlens, **rest):
        if op is hgrn2_scan:
            operands, activation = (q, rest["f"], None, v, rest["lower_bound"]), "silu"
        else:
            operands, activation = (q, rest["log_f"], rest["k"], v, None), "none"
        call = ScanCall(*operands, initial_state, cu_seqlens, ScanSettings(q_activation=activation))
        return run_scan(call, find(backend))

    return scan


def log_uniform(shape: tuple[int, ...], low: float, high: float, seed: int = 0) -> Tensor:
    """Values whose logarithm is uniform between those of low and high, float32."""
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.exp(math.log(low) + uniform * math.log(high / low)).float()


def spread(shape: tuple[int, ...], choices: tuple[float, ...], seed: int = 0) -> Tensor:
    """Each element one of the choices, drawn anew for every token and channel, float32."""
    picks = torch.randint(len(choices), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(choices)[picks]


def decays(kind: str | float, shape: tuple[int, ...]) -> Tensor:
    """Log decays [..., K] of a kind of extreme, or all of one value, float32."""
    if kind == "log-uniform":
        return -log_uniform(shape, 1e-6, 50)
    if kind == "per channel":
        return -log_uniform((1, 1, *shape[2:]), 1e-6, 50).expand(shape)
    if kind == "wild":
        return spread(shape, (-1e-6, -1e-3, -0.5, -50.0, -200.0, -math.inf, 0.0))
    if kind == "seldom reset":
        return spread(shape, (-1e-6,) * 50 + (-50.0,))
    return torch.full(shape, float(kind))


def slow(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs with one head and K = 16, their gates so close to 1 that float32 cannot hold them.

    With f = 1 - 3e-6, rounding errors of equal gates all point the same way.
    """
    z = torch.linspace(12, 14, 16)
    if "f" in inputs:
        return inputs | {"f": z.expand(inputs["f"].shape), "lower_bound": torch.zeros(1, 16)}
    log_f = torch.nn.functional.logsigmoid(z).expand(inputs["log_f"].shape)
    # keys as small as a tied one, so that the first state is what the last one shows
    return inputs | {"log_f": log_f, "k": inputs["k"] * 1e-6}


def honest_scan(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: None = None,
    min_log_decay: float | None = None,
    q_activation: str = "silu",
    v_activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """The recurrence in plain torch in the dtype of q, as a careful person writes it.

    Gates and the state are float32; what a product takes in is rounded to the dtype of q: query, key and value, and the
    state where it is read. Autograd rounds their gradients at the same places.
    """
    assert cu_seqlens is None
    assert initial_state is not None
    low = q.dtype
    z = f.float()
    bound = torch.zeros(()) if lower_bound is None else lower_bound
    decay, key = bound + (1 - bound) * torch.sigmoid(z), ((1 - bound) * torch.sigmoid(-z)).to(low)
    if min_log_decay is not None:
        decay = decay.clamp_min(math.exp(min_log_decay))
    query, v = activation(q, q_activation), activation(v, v_activation)
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + key[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((query[:, t, :, None] @ state.to(low)).squeeze(-2))
    return torch.stack(outputs, 1), state


def honest_gated_scan(
    q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: None, k: Tensor, log_f: Tensor
) -> tuple[Tensor, Tensor]:
    """As `honest_scan`, for an untied key and the log decay."""
    assert cu_seqlens is None
    assert initial_state is not None
    low = q.dtype
    decay = torch.exp(log_f)
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None] @ state.to(low)).squeeze(-2))
    return torch.stack(outputs, 1), state


def honest(
    op: Callable[..., Any], inputs: Mapping[str, Any], reverse: bool = False, **settings: Any
) -> dict[str, Tensor]:
    """Return the results of `run` with honest torch in the dtype of the inputs, one sequence at a time."""
    scan = partial({hgrn2_scan: honest_scan, gated_scan: honest_gated_scan}[op], **settings)

    def whole(**inputs):
        if reverse:
            inputs = {name: x.flip(1) if name in BY_TOKEN else x for name, x in inputs.items()}
        y, state = scan(**inputs)
        return (y.flip(1) if reverse else y), state

    def packed(cu_seqlens, initial_state, **inputs):
        if cu_seqlens is None:
            return whole(cu_seqlens=None, initial_state=initial_state, **inputs)
        outputs, states = [], []
        for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            state = initial_state[n : n + 1]
            if start < stop:
                part = {name: x[:, start:stop] if name in BY_TOKEN else x for name, x in inputs.items()}
                y, state = whole(cu_seqlens=None, initial_state=state, **part)
                outputs.append(y)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states)

    return run(packed, inputs)
