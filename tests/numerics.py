"""The one judge of numerical results: relative errors against an exact result, alone or beside honest torch's.

The exact result is the step-by-step recurrence in float64 on the same (already rounded) inputs. Float32 has absolute
limits. Low precision is compared with honest torch in the same dtype: what a careful person gets from plain torch
operations, rounding where every implementation of that dtype has to round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

ORDINARY_RMS = 2e-6
EXTREME_RMS = 1e-5
FLOAT64_RMS = 1e-12


class RelativeError(NamedTuple):
    """Error of a tensor relative to the size of the exact one."""

    rms: float
    max: float


def relative_error(found: Tensor, exact: Tensor) -> RelativeError:
    """RMS error over the exact RMS, and largest error over the largest exact value.

    Sizes below the smallest normal number of the found dtype count as that number: below it no digits are promised.
    """
    assert found.shape == exact.shape, f"shape {tuple(found.shape)} instead of {tuple(exact.shape)}"
    exact = exact.detach().double()
    difference = found.detach().double() - exact
    if not exact.numel():
        return RelativeError(0.0, 0.0)
    smallest = torch.finfo(found.dtype).tiny
    size = exact.abs().max().clamp(min=smallest)
    # divided first: squares of tiny gradients would underflow
    rms = (difference / size).square().mean().sqrt() / (exact / size).square().mean().sqrt().clamp(min=smallest / size)
    return RelativeError(rms.item(), (difference.abs().max() / size).item())


def is_gradient(name: str) -> bool:
    """Whether a result's name, as `run` gives it, is that of a gradient."""
    return name.startswith("d_")


def run(
    op: Callable[..., tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor | None],
    *,
    outputs: tuple[str, ...] = ("y", "final_state"),
    dtype: torch.dtype | None = None,
    gradients: bool = True,
    **settings: object,
) -> dict[str, Tensor]:
    """Calls op and returns its outputs and, named d_<input>, the gradient of each floating input.

    The loss is a sum over all outputs with fixed weights: a function of the outputs' shapes alone, the same values in
    whatever dtype, so that runs can be compared.

    Args:
        op: called as op(**inputs, **settings).
        inputs: tensors by name; None stays None.
        outputs: names of what op returns.
        dtype: cast floating inputs to it first.
        gradients: also run backwards.
        settings: passed on.
    """
    leaves: dict[str, Tensor | None] = {}
    for name, x in inputs.items():
        if x is not None and x.is_floating_point():
            # detach keeps strides: non-contiguous inputs stay so
            x = (x.detach() if dtype is None else x.detach().to(dtype)).requires_grad_(gradients)
        leaves[name] = x
    found = dict(zip(outputs, op(**leaves, **settings), strict=True))
    results = {name: x.detach() for name, x in found.items()}
    if gradients:
        wanted = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
        # without a token an output may depend on nothing
        losses = [x for x in found.values() if x.requires_grad]
        grads = [torch.zeros_like(x) for x in wanted.values()]
        if losses:
            weights = [_weights(x) for x in losses]
            grads = torch.autograd.grad(
                losses, list(wanted.values()), weights, allow_unused=True, materialize_grads=True
            )
        results |= {f"d_{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def _weights(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    # rounded to bfloat16 so that every dtype sees the same values
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).bfloat16().to(output)


def assert_close(found: Mapping[str, Tensor], exact: Mapping[str, Tensor], rms: float) -> None:
    """Fails unless every result is finite and its relative RMS error is at most `rms`."""
    errors = _errors(found, exact)
    assert all(error.rms <= rms for error in errors.values()), f"wanted rms <= {rms:g}, found {errors}"


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Fails unless every result has the wanted bits."""
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert torch.equal(found[name], x), f"{name} differs: {relative_error(found[name], x)}"


def assert_no_worse(
    found: Mapping[str, Tensor],
    honest: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    factor: float = 2.0,
    gradient_factor: float = 3.0,
) -> None:
    """Fails unless every result's error is within a factor of honest torch's, RMS and max.

    The largest error of few thousand values can be small by luck, so for max honest torch counts as at least eps / 4 of
    the dtype of y: the mean error of rounding the largest value once.
    """
    errors, honest_errors = _errors(found, exact), _errors(honest, exact)
    one_rounding = torch.finfo(found["y"].dtype).eps / 4
    for name, error in errors.items():
        limit = gradient_factor if is_gradient(name) else factor
        base = honest_errors[name]
        assert error.rms <= limit * base.rms, f"{name}: {error}, honest torch {base}"
        assert error.max <= limit * max(base.max, one_rounding), f"{name}: {error}, honest torch {base}"


def _errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, RelativeError]:
    assert found.keys() == exact.keys(), f"results {sorted(found)} instead of {sorted(exact)}"
    for name, x in found.items():
        assert x.isfinite().all(), f"{name} has values that are not finite"
    return {name: relative_error(found[name], exact[name]) for name in exact}
