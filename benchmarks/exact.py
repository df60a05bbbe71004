"""Inputs, products, exact results and errors for the benchmarks of the operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import environment  # noqa: F401  (before torch)
import torch
from torch import Tensor
from torch.nn import functional

from hgrn2.ops import gated_scan, hgrn2_scan

# relative RMS error against float64; outputs and gradients
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


class Inputs(NamedTuple):
    """Pre-activations [B, T, H, K], [B, T, H, K], [B, T, H, V] and the lower bound [H, K]."""

    q: Tensor
    f: Tensor
    v: Tensor
    lower_bound: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """In another dtype, the bound in its own."""
        return Inputs(self.q.to(dtype), self.f.to(dtype), self.v.to(dtype), self.lower_bound)


class FreeInputs(NamedTuple):
    """Inputs of `gated_scan`: query, key [B, T, H, K], value [B, T, H, V] and, float32, the log decay [B, T, H, K]."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_f: Tensor


def make_inputs(
    batch: int, length: int, heads: int, k_width: int, v_width: int, device: str,
    dtype: torch.dtype = torch.float32, bound: float = 0.5,
) -> Inputs:  # fmt: skip
    """Fresh random inputs; with the usual bound, gates are those of a young model in the middle of its layers."""

    def normal(width: int) -> Tensor:
        return torch.randn(batch, length, heads, width, device=device, dtype=dtype)

    return Inputs(normal(k_width), normal(k_width), normal(v_width), torch.full((heads, k_width), bound, device=device))


def free_inputs(inputs: Inputs) -> FreeInputs:
    """Return the sequence as `gated_scan` takes it, with gates computed from the pre-activations."""
    key = (1 - inputs.lower_bound) * torch.sigmoid(-inputs.f.float())
    return FreeInputs(functional.silu(inputs.q), key.to(inputs.q.dtype), inputs.v, torch.log1p(-key))


def scan(
    q: Tensor, f: Tensor, v: Tensor, lower_bound: Tensor, cu_seqlens: Tensor | None = None,
    min_log_decay: float | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The product."""
    y, _ = hgrn2_scan(q, f, v, lower_bound, cu_seqlens=cu_seqlens, min_log_decay=min_log_decay, backend=backend)
    return y


def free_scan(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, backend: str = "auto") -> Tensor:
    """The product with an untied key and decay."""
    return gated_scan(q, k, v, log_f, backend=backend)[0]


# the recurrence, token by token
loop = partial(scan, backend="reference")
free_loop = partial(free_scan, backend="reference")


def with_backward(
    function: Callable[..., Tensor], inputs: Inputs | FreeInputs, dy: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A call of function followed by the gradients of all inputs."""
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    dy = dy.to(inputs.v.dtype)
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


def without_gradients(function: Callable[..., Tensor], inputs: Inputs | FreeInputs) -> Callable[[], Tensor]:
    """A call of function that records nothing."""

    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


def exact(inputs: Inputs | FreeInputs, dy: Tensor | None, truth: Callable[..., Tensor] = loop) -> list[Tensor]:
    """[y], or with dy the gradients, in float64 and by the recurrence; head by head, to save memory.

    Args:
        inputs: in any dtype.
        dy: [B, T, H, V], gradient of y.
        truth: function of the inputs, which is trusted.
    """
    parts = []
    for head in range(inputs.q.shape[2]):
        # heads are the last axis but one of every input, the bound among them
        one = inputs._make(x[..., head : head + 1, :].double() for x in inputs)
        if dy is None:
            parts.append([truth(*one)])
        else:
            parts.append(list(with_backward(truth, one, dy[:, :, head : head + 1])()))
    return [torch.cat(columns, columns[0].dim() - 2) for columns in zip(*parts, strict=True)]


def errors(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    """Relative RMS error of each of several tensors."""
    return [
        ((one.double() - two).square().mean() / two.square().mean()).sqrt().item()
        for one, two in zip(found, wanted, strict=True)
    ]


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest relative RMS error of several tensors, NaN if one is."""
    # Python's max would pass over a NaN
    return torch.tensor(errors(found, wanted), dtype=torch.float64).max().item()
