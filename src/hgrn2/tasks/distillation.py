"""Distillation: train on text and on the predictions of another model (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hgrn2.constraints import Ge, Le
from hgrn2.data.batches import Batch
from hgrn2.data.find_tokenizer import check_same_tokens, tokenizer_of
from hgrn2.errors import UserError
from hgrn2.formats.opening import open_folder, read_folder_config
from hgrn2.formats.run_folder import locate_model, model_folder
from hgrn2.models import HGRN2LM
from hgrn2.nn.loss import IGNORE, ROWS
from hgrn2.tasks.base import TaskContext
from hgrn2.tasks.language import LanguageOptions, LanguageTask
from hgrn2.tasks.registry import register_task

WEIGHT, TEMPERATURE = 0.5, 1.0


@dataclass(frozen=True)
class DistillationOptions(LanguageOptions):
    """Options of next-token prediction with a teacher."""

    paths = ("teacher",)

    teacher: str | None = None
    """A model with the same tokens to learn from as well: a run or a folder, as for --from."""
    distill_weight: Annotated[float | None, Ge(0), Le(1)] = None
    """Weight of the divergence from the teacher's predictions in the loss, 0 to 1 (default: 0.5)."""
    distill_temperature: Annotated[float | None, Ge(0.01), Le(1000)] = None
    """Temperature: divides the logits of both models in the divergence (default: 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher or "\0" in self.teacher:
            raise UserError(
                f"train config: teacher is {self.teacher!r}; wanted a run, or a folder with a model: --teacher"
            )
        if self.stream or self.initial_state != "zero":
            found = "stream" if self.stream else "initial_state"
            raise UserError(
                f"train config: a teacher reads packed documents from zero states; leave out {found}, or the teacher",
                "contradiction",
            )


@register_task
class DistillationTask(LanguageTask):
    """Next-token prediction combined with the predictions of a teacher.

    Args:
        options: settings of windows, validation and samples, and the teacher.
        context: provides data (`PreparedData`), batch_size, seed, device, sampler and model_config.

    Raises:
        UserError: there is no such teacher, or it has other tokens.
    """

    name = "distillation"
    splits_sequences = calls_forward = False
    Options = DistillationOptions

    def __init__(self, options: DistillationOptions, context: TaskContext) -> None:
        super().__init__(options, context)
        self._teacher = open_teacher(options, context)
        self._weight = WEIGHT if options.distill_weight is None else options.distill_weight
        self._temperature = TEMPERATURE if options.distill_temperature is None else options.distill_temperature

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return `distillation_loss` of a packed batch."""
        batch = batch.to(self._device, non_blocking=True)
        x, _ = model.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens, keep_state=False)
        with torch.no_grad():
            seen, _ = self._teacher.hidden_states(batch.input_ids, cu_seqlens=batch.cu_seqlens, keep_state=False)
        return distillation_loss(
            x.flatten(0, 1), model.lm_head.weight, seen.flatten(0, 1), self._teacher.lm_head.weight,
            batch.targets.flatten(), self._weight, self._temperature,
        )  # fmt: skip


def check_teacher(options: DistillationOptions) -> None:
    """Check, without reading weights, that there is a teacher.

    Raises:
        UserError: there is no such teacher.
    """
    assert options.teacher is not None, "the options refuse None"
    with _naming_the_teacher():
        read_folder_config(model_folder(Path(options.teacher)))


@contextmanager
def _naming_the_teacher() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        # a resumed run uses the saved path of its teacher
        hint = "if the teacher has moved, name its new path: --teacher NEW"
        raise UserError(f"teacher {error}; {hint}", error.code) from None


def open_teacher(options: DistillationOptions, context: TaskContext) -> HGRN2LM:
    """Open the teacher on the device, in evaluation mode, without gradients.

    Raises:
        UserError: there is no such teacher, or its tokens are not those of the data.
    """
    assert options.teacher is not None, "the options refuse None"
    with _naming_the_teacher():
        folder, tokenizer_dir = locate_model(Path(options.teacher))
        opened = open_folder(folder)
    vocab_size = context.model_config.vocab_size
    if opened.config.vocab_size != vocab_size:
        raise UserError(
            f"teacher {folder}: has a vocabulary of {opened.config.vocab_size}, the model one of {vocab_size}; wanted "
            "the same tokens",
            "mismatch",
        )
    check_same_tokens(tokenizer_of(tokenizer_dir), context.data.tokenizer, f"teacher {folder}")
    return opened.load(context.device).requires_grad_(False)


def distillation_loss(
    x: Tensor, head: Tensor, teacher_x: Tensor, teacher_head: Tensor, targets: Tensor, weight: float, temperature: float
) -> Tensor:
    """Return (1 - weight) cross entropy + weight temperature^2 KL(teacher || model), summed, in parts of the rows.

    The divergence compares the softmax of logits / temperature; temperature^2 preserves the size of the gradient.

    Args:
        x: [M, D], last hidden states of the student.
        head: [vocab, D], head of the student.
        teacher_x: [M, D'], last hidden states of the teacher.
        teacher_head: [vocab, D'], head of the teacher.
        targets: [M] int64; rows with -100 are ignored.
        weight: weight of the divergence, 0 to 1.
        temperature: divides the logits; above 0.

    Returns:
        A scalar in nats, float32 (float64 for float64 inputs).
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
        # the backward pass recomputes the logits of each part
        total = total + checkpoint(
            part, x[rows], teacher_x[rows], targets[rows], use_reentrant=False, preserve_rng_state=False
        )
    return total
