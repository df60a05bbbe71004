"""Learning from another model's predictions beside the text (distillation, arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hgrn2.data.batches import Batch
from hgrn2.models import HGRN2LM
from hgrn2.nn.loss import IGNORE, ROWS
from hgrn2.train.config import TrainConfig

WEIGHT, TEMPERATURE = 0.5, 1.0


class Teacher:
    """A model that another one learns from; it does not change.

    Args:
        model: of the same vocabulary as the one that learns, on its device.
        config: distill_weight and distill_temperature are read.
    """

    def __init__(self, model: HGRN2LM, config: TrainConfig) -> None:
        self._model = model.eval().requires_grad_(False)
        self._weight = WEIGHT if config.distill_weight is None else config.distill_weight
        self._temperature = TEMPERATURE if config.distill_temperature is None else config.distill_temperature

    def loss(self, hidden_states: Callable[..., Any], head: Tensor, batch: Batch) -> Tensor:
        """See `distillation_loss`, for one packed batch.

        Args:
            hidden_states: of the model that learns, called as `HGRN2LM.hidden_states`.
            head: its last matrix [vocab, D].
            batch: on the model's device.
        """
        x, _ = hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens, keep_state=False)
        with torch.no_grad():
            seen, _ = self._model.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens, keep_state=False)
        return distillation_loss(
            x.flatten(0, 1), head, seen.flatten(0, 1), self._model.lm_head.weight, batch.targets.flatten(),
            self._weight, self._temperature,
        )  # fmt: skip


def distillation_loss(
    x: Tensor, head: Tensor, teacher_x: Tensor, teacher_head: Tensor, targets: Tensor, weight: float, temperature: float
) -> Tensor:
    """(1 - weight) cross entropy + weight temperature^2 KL(teacher || model), summed; never all logits at once.

    The divergence is that of the softmax of logits / temperature; its factor keeps the size of the gradient.

    Args:
        x: [M, D], the last hidden states of the model that learns.
        head: [vocab, D].
        teacher_x: [M, D'], those of the teacher.
        teacher_head: [vocab, D'].
        targets: [M] int64; -100 is not counted, in neither part.
        weight: 0 to 1.
        temperature: above 0.

    Returns:
        A scalar in nats, float32 (float64 for float64).
    """

    def part(x: Tensor, teacher_x: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits, wanted = functional.linear(x, head).to(dtype), functional.linear(teacher_x, teacher_head).to(dtype)
        cross_entropy = functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        log_p, log_q = (functional.log_softmax(z / temperature, -1) for z in (wanted, logits))
        divergence = ((log_p.exp() * (log_p - log_q)).sum(-1) * (targets != IGNORE)).sum()
        return (1 - weight) * cross_entropy + weight * temperature**2 * divergence

    total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for start in range(0, x.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        # the backward pass computes a part's logits again
        total = total + checkpoint(
            part, x[rows], teacher_x[rows], targets[rows], use_reentrant=False, preserve_rng_state=False
        )
    return total
