"""What the benchmarks of the operator share: inputs, the product, exact results and errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hgrn2.ops import hgrn2_scan

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


def make_inputs(
    batch: int, length: int, heads: int, k_width: int, v_width: int, device: str, dtype: torch.dtype = torch.float32
) -> Inputs:
    """Fresh random inputs, the gates those of a young model in the middle of its layers."""

    def normal(width: int) -> Tensor:
        return torch.randn(batch, length, heads, width, device=device, dtype=dtype)

    return Inputs(normal(k_width), normal(k_width), normal(v_width), torch.full((heads, k_width), 0.5, device=device))


def scan(q: Tensor, f: Tensor, v: Tensor, lower_bound: Tensor) -> Tensor:
    """The product."""
    return hgrn2_scan(q, f, v, lower_bound)[0]


def loop(q: Tensor, f: Tensor, v: Tensor, lower_bound: Tensor) -> Tensor:
    """The recurrence, token by token."""
    return hgrn2_scan(q, f, v, lower_bound, backend="reference")[0]


def with_backward(function: Callable[..., Tensor], inputs: Inputs, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A call of function followed by the gradients of all inputs."""
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    dy = dy.to(inputs.v.dtype)
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


def without_gradients(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Tensor]:
    """A call of function that records nothing."""

    def call() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return call


def exact(inputs: Inputs, dy: Tensor | None) -> list[Tensor]:
    """[y], or with dy the gradients, by the float64 recurrence; head by head, to save memory."""
    parts = []
    for head in range(inputs.q.shape[2]):
        h = slice(head, head + 1)
        q, f, v = (x[:, :, h].double() for x in inputs[:3])
        one = Inputs(q, f, v, inputs.lower_bound[h].double())
        if dy is None:
            parts.append([loop(*one)])
        else:
            parts.append(list(with_backward(loop, one, dy[:, :, h].double())()))
    return [torch.cat(columns, columns[0].dim() - 2) for columns in zip(*parts, strict=True)]


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest relative RMS error of several tensors."""
    return max(
        ((one.double() - two).square().mean() / two.square().mean()).sqrt().item()
        for one, two in zip(found, wanted, strict=True)
    )
