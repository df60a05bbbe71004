"""Language modelling as a task for the loop: packed documents, or streams with the state carried along."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2.data.batches import Batch, PackedBatches, StreamBatches
from hgrn2.data.sequential import sequential_windows
from hgrn2.data.tokens import TokenDataset
from hgrn2.models import ModelState
from hgrn2.train.config import TrainConfig
from hgrn2.train.distill import Teacher

# writes text: from the model and a prompt to the prompt and its continuation
Sampler = Callable[[nn.Module, str], str]


class LanguageTask:
    """Next-token prediction; the task of `hgrn2 train`.

    Args:
        train: tokens to train on.
        validation: held-out tokens.
        config: batch_size, seq_len, stream, seed, validation_tokens, sample_prompt and compile are read.
        device: where the model is.
        sampler: writes the samples; None: no samples.
        teacher: what the model learns from beside the text; None: the text alone.

    Raises:
        UserError: the training tokens are fewer than a window needs.
    """

    def __init__(
        self,
        train: TokenDataset,
        validation: TokenDataset,
        config: TrainConfig,
        device: torch.device,
        sampler: Sampler | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        batches = StreamBatches if config.stream else PackedBatches
        self._batches = batches(train, config.batch_size, config.seq_len, seed=config.seed)
        self._held_out = sequential_windows(
            validation, config.seq_len, config.batch_size, max_tokens=config.validation_tokens
        )
        self._keeps_text = validation.keeps_text
        self._config = config
        self._device = device
        self._sampler = sampler
        self._teacher = teacher
        self._carried: ModelState | None = None

    def next_batch(self) -> Batch:
        """The next batch, on the CPU, where its targets are counted without waiting for the device."""
        batch = next(self._batches)
        # memory from which a copy to the device needs no waiting
        return batch.pin_memory() if self._device.type == "cuda" else batch

    def num_tokens(self, batch: Batch) -> int:
        """Inputs of the batch."""
        return batch.input_ids.numel()

    def num_targets(self, batch: Batch) -> int:
        """Targets that are not ignored."""
        return int((batch.targets >= 0).sum())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Cross entropy summed over the targets, nats; with a teacher, mixed with the divergence from it."""
        part = model.loss if self._teacher is None else model.hidden_states
        batch = batch.to(self._device, non_blocking=True)
        if self._teacher is not None:
            return self._teacher.loss(part, model.lm_head.weight, batch)
        loss_sum, self._carried = carried_loss(part, batch, self._carried)
        return loss_sum

    def step_skipped(self) -> None:
        """Let the streams start from zero: a state that is not finite would spoil every step to come."""
        self._carried = None

    def evaluate(self, model: Any) -> dict[str, Any]:
        """See text_figures; the state is carried through whole documents."""
        nats = 0.0
        carried: ModelState | None = None
        for batch in self._held_out:
            loss_sum, carried = carried_loss(model.loss, batch.to(self._device, non_blocking=True), carried)
            nats += loss_sum.item()
        return text_figures(nats, self._held_out.num_tokens, self._held_out.num_text_bytes, self._keeps_text)

    def sample(self, model: nn.Module) -> str | None:
        """The prompt and what the model makes of it."""
        return None if self._sampler is None else self._sampler(model, self._config.sample_prompt)

    def state_dict(self) -> dict[str, Any]:
        """Position in the data."""
        return self._batches.state_dict()

    def state_tensors(self) -> dict[str, Tensor]:
        """The states carried by the streams."""
        return {} if self._carried is None else self._carried.tensors()

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put back position and carried states."""
        self._batches.load_state_dict(state)
        moved = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        self._carried = ModelState.from_tensors(moved) if moved else None


def carried_loss(
    loss: Callable[..., tuple[Tensor, Tensor, ModelState]], batch: Batch, carried: ModelState | None
) -> tuple[Tensor, ModelState | None]:
    """The loss of one batch, whose sequences go on from the carried states where the batch says so.

    Args:
        loss: the model's loss.
        batch: packed, on the model's device.
        carried: the state of every stream, as this function returned it; None at the start.

    Returns:
        The summed loss, and the state of every stream to carry on, without its history; None if the batch
        carries nothing.
    """
    state = None if carried is None or batch.carry_from is None else carried.select(batch.carry_from)
    keep_state = batch.carry_to is not None
    loss_sum, _, state = loss(
        batch.input_ids, batch.targets, state=state, cu_seqlens=batch.cu_seqlens, keep_state=keep_state
    )
    return loss_sum, None if batch.carry_to is None else state.detach().select(batch.carry_to)


def text_figures(nats: float, num_tokens: int, num_text_bytes: int, keeps_text: bool = True) -> dict[str, Any]:
    """Turn a cross entropy summed over a text into figures.

    Args:
        nats: summed over the targets.
        num_tokens: number of targets.
        num_text_bytes: UTF-8 bytes of the text they stand for.
        keeps_text: whether the text can be told from its tokens; otherwise bits per byte would flatter the tokenizer.

    Returns:
        val_loss (nats per token), val_perplexity (its exp), val_bits_per_byte (comparable between tokenizers; None if
        the tokens do not keep the text), and what they were measured on: val_tokens, val_text_bytes.
    """
    loss = nats / num_tokens
    return {
        "val_loss": loss,
        # beyond 700 the exponential overflows
        "val_perplexity": math.exp(min(loss, 700.0)),
        "val_bits_per_byte": nats / math.log(2) / num_text_bytes if keeps_text else None,
        "val_tokens": num_tokens,
        "val_text_bytes": num_text_bytes,
    }
