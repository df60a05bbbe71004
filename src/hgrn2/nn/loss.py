"""Cross entropy of a linear head that never holds all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from hgrn2.nn.autocast import autocast_dtype
from hgrn2.ops.backends import triton_runs
from hgrn2.ops.device import ROW_ALIGNMENT
from hgrn2.ops.export import is_onnx_export

IGNORE = -100
# rows of logits in memory at a time
ROWS = 1024
# bytes of logits in memory at a time on a GPU, where one kernel overwrites them with their gradient
_BLOCK_BYTES = 1 << 29


# not an autograd.Function, for which the compiler of torch 2.11 silently gives zeros as gradients
@torch.library.custom_op("hgrn2::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss together with the gradients of x and weight, so that logits are computed only once."""
    loss, dx, d_weight = _empty_results(x, weight, needs_gradient)
    loss.zero_()
    d_weight.zero_()
    low_weight = weight.to(x.dtype)
    if x.is_cuda and triton_runs(x.dtype):
        return _in_triton(x, low_weight, targets, loss, dx, d_weight)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[0], ROWS):
            part, target = x[start : start + ROWS], targets[start : start + ROWS]
            log_p = functional.log_softmax((part @ low_weight.T).to(loss.dtype), -1)
            loss += functional.nll_loss(log_p, target, ignore_index=IGNORE, reduction="sum")
            if needs_gradient:
                d_logits = log_p.exp_()
                d_logits[torch.arange(target.shape[0], device=x.device), target.clamp_min(0)] -= 1
                d_logits = (d_logits * (target != IGNORE).unsqueeze(-1)).to(x.dtype)
                dx[start : start + ROWS] = d_logits @ low_weight
                d_weight += d_logits.T @ part
    return loss, dx, d_weight


def _in_triton(
    x: Tensor, weight: Tensor, targets: Tensor, loss: Tensor, dx: Tensor, d_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill the results of `_loss_and_gradients`; dx and d_weight are empty if no gradient is needed."""
    from hgrn2.ops.triton.cross_entropy import cross_entropy_

    needs_gradient, vocab_size = dx.numel() > 0, weight.shape[0]
    weight = functional.pad(weight, (0, 0, 0, -vocab_size % ROW_ALIGNMENT))
    rows = max(ROWS, _BLOCK_BYTES // (weight.shape[0] * x.element_size()))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[0], rows):
            part = x[start : start + rows]
            logits = part @ weight.T
            loss += cross_entropy_(logits, targets[start : start + rows], vocab_size, IGNORE, needs_gradient).sum()
            if needs_gradient:
                torch.mm(logits, weight, out=dx[start : start + rows])
                # the sum over tokens stays in float32
                d_weight += torch.mm(logits.T, part, out_dtype=d_weight.dtype)[:vocab_size]
    return loss, dx, d_weight


def _empty_results(x: Tensor, weight: Tensor, needs_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty((), dtype=dtype)
    if not needs_gradient:
        return loss, x.new_empty(0), x.new_empty(0, dtype=dtype)
    return loss, x.new_empty(x.shape), weight.new_empty(weight.shape, dtype=dtype)


@_loss_and_gradients.register_fake
def _(x, weight, targets, needs_gradient):
    return _empty_results(x, weight, needs_gradient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.weight_dtype = inputs[1].dtype


class _NoDerivative(torch.autograd.Function):
    """The identity, which raises an error if it is differentiated."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the loss has no second derivative; compute it from logits with torch.nn.functional.cross_entropy"
        )


def _backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
    dx, d_weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        # otherwise these results of the operator would count as constants
        dx, d_weight = _NoDerivative.apply(dx, d_weight)  # pyright: ignore[reportGeneralTypeIssues]
    return dx * grad.to(dx.dtype), (d_weight * grad).to(ctx.weight_dtype), None, None


_loss_and_gradients.register_autograd(_backward, setup_context=_save)


def _is_transformed() -> bool:
    """Return whether torch.func or forward mode is active, for which the operator has no derivatives."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the summed cross entropy of softmax(x weight^T).

    Args:
        x: [M, D], the last hidden states; under autocast they are cast to its dtype.
        weight: [vocab, D].
        targets: [M] int64; -100 is ignored.

    Returns:
        A scalar in nats, float32 (float64 for float64).

    Raises:
        RuntimeError: a second derivative is computed without torch.func.
    """
    x = x.to(autocast_dtype(x) or x.dtype)
    if is_onnx_export() or _is_transformed():
        logits = (x @ weight.to(x.dtype).T).to(torch.promote_types(x.dtype, torch.float32))
        return functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _loss_and_gradients(x, weight, targets, needs_gradient)[0]
