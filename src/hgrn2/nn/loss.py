"""Cross entropy of a linear head that never holds all logits at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IGNORE = -100
# rows of logits that exist at a time
ROWS = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is made beside the loss: the logits are at hand, and only once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, needs_gradient: bool) -> Tensor:
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        dx = torch.empty_like(x) if needs_gradient else None
        d_weight = torch.zeros_like(weight, dtype=loss.dtype) if needs_gradient else None
        low_weight = weight.to(x.dtype)
        for start in range(0, x.shape[0], ROWS):
            part, target = x[start : start + ROWS], targets[start : start + ROWS]
            logits = (part @ low_weight.T).to(loss.dtype)
            log_p = functional.log_softmax(logits, -1)
            loss += functional.nll_loss(log_p, target, ignore_index=IGNORE, reduction="sum")
            if dx is not None and d_weight is not None:
                counted = target != IGNORE
                d_logits = log_p.exp_()
                d_logits[torch.arange(target.shape[0], device=x.device), target.clamp_min(0)] -= 1
                d_logits = (d_logits * counted.unsqueeze(-1)).to(x.dtype)
                dx[start : start + ROWS] = d_logits @ low_weight
                d_weight += d_logits.T @ part
        ctx.save_for_backward(dx, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dx, d_weight = ctx.saved_tensors
        return dx * grads[0].to(dx.dtype), (d_weight * grads[0]).to(ctx.weight_dtype), None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy of softmax(x weight^T).

    Args:
        x: [M, D], the last hidden states; under autocast they are taken in its dtype.
        weight: [vocab, D].
        targets: [M] int64; -100 is not counted.

    Returns:
        A scalar in nats, float32 (float64 for float64).
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    with torch.autocast(x.device.type, enabled=False):
        return _LinearCrossEntropy.apply(x, weight, targets, needs_gradient)
