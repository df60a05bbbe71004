"""Language modelling on packed documents, or on streams that carry state."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Self

from torch import Tensor, nn

from hgrn2.constraints import Ge, Gt, Le, check_fields
from hgrn2.data.batches import Batch, PackedBatches, StreamBatches
from hgrn2.data.sequential import sequential_windows
from hgrn2.errors import UserError
from hgrn2.models import ModelState
from hgrn2.nn.loss import IGNORE
from hgrn2.ops.pieces import Pieces
from hgrn2.quantities import perplexity
from hgrn2.tasks.base import Metric, ReportFigure, TaskBase, TaskContext, TaskOptions, TaskReport
from hgrn2.tasks.initial_states import InitialState, check_states, noise, start_from_others
from hgrn2.tasks.registry import register_task


@dataclass(frozen=True)
class LanguageOptions(TaskOptions):
    """Options of next-token prediction."""

    what = "train config"

    seq_len: Annotated[int, Gt(0)] = 1024
    """Tokens per sequence."""
    stream: bool = False
    """Carry the state between windows of a document (truncated backpropagation) instead of packing."""
    initial_state: InitialState = "zero"
    """State that packed sequences start from in training: zero, passed (the final state of another text of the step
    before), noise (normal numbers), or fitted-noise (with the mean and deviation of final states)."""
    initial_state_share: Annotated[float, Ge(0), Le(1)] = 1.0
    """Share of the sequences that start from such a state; the others start from zero."""
    initial_state_std: Annotated[float, Gt(0)] = 1.0
    """Standard deviation of the numbers of noise."""
    validation_tokens: Annotated[int, Gt(0)] = 262_144
    """Held-out tokens per validation: a fixed random sample of documents."""
    sample_prompt: str = ""
    """Prompt of the text samples; empty: the start of a document."""

    def __post_init__(self) -> None:
        check_fields(self, self.what)
        if self.stream and self.initial_state != "zero":
            raise UserError(
                f"train config: initial_state is {self.initial_state!r}, and stream carries the states of the same "
                "text; leave one of them out",
                "contradiction",
            )
        try:
            self.sample_prompt.encode("utf-8")
        except UnicodeEncodeError:
            # otherwise the first sample would fail, perhaps at the end of the run
            raise UserError(f"train config: sample_prompt is {self.sample_prompt!r}; wanted UTF-8 text") from None

    @property
    def tokens_per_example(self) -> int:
        """Tokens of a sequence."""
        return self.seq_len


@register_task
class LanguageTask(TaskBase):
    """Next-token prediction on prepared text; the task of `hgrn2 train`.

    Args:
        options: settings of windows, validation and samples.
        context: provides data (`PreparedData`), batch_size, seed, device and sampler.

    Raises:
        UserError: there are fewer training tokens than one window needs.
    """

    name = "language"
    Options = LanguageOptions
    metric = Metric("val_loss")
    reads_text = True
    splits_batches = splits_sequences = calls_forward = True
    report = TaskReport(
        model="A language model",
        unit="nats per token",
        figures=(
            ReportFigure("val_bits_per_byte", "bits per byte", ".3f", "of held-out text; lower is better", ".4f"),
            ReportFigure("val_perplexity", "perplexity", ",.2f", "a token of held-out text", ",.2f"),
        ),
    )

    def __init__(self, options: LanguageOptions, context: TaskContext) -> None:
        train, validation = context.data.train, context.data.validation
        batches = StreamBatches if options.stream else PackedBatches
        self._batches = batches(
            train, context.batch_size, options.seq_len, seed=context.seed, rank=context.rank,
            world_size=context.num_ranks,
        )  # fmt: skip
        self._held_out = sequential_windows(
            validation, options.seq_len, context.batch_size, max_tokens=options.validation_tokens
        )
        self._keeps_text = validation.keeps_text
        self._options = options
        self._device = context.device
        self._sampler = context.sampler
        self._carried: ModelState | None = None
        self._seed = context.seed
        self._pieces = context.pieces
        self._num_losses = 0

    @classmethod
    def build(cls, options: LanguageOptions, context: TaskContext) -> Self:
        """Make the task."""
        return cls(options, context)

    @property
    def carries_state(self) -> bool:
        """Whether sequences start from states of the previous step."""
        return self._options.stream or self._options.initial_state != "zero"

    def next_batch(self) -> Batch:
        """Return the next batch on the CPU, where counting its targets does not wait for the device."""
        position, own = self._batches.position, self._options
        batch = next(self._batches)
        if own.initial_state != "zero":
            batch = start_from_others(batch, own.seq_len, own.initial_state_share, self._seed, position)
        if self._pieces is not None:
            batch = batch.piece(self._pieces.index, self._pieces.count)
        # copies from pinned memory to the device are asynchronous
        return batch.pin_memory() if self._device.type == "cuda" else batch

    def num_tokens(self, batch: Batch) -> int:
        """Return the number of inputs of the batch."""
        return batch.input_ids.numel()

    def num_targets(self, batch: Batch) -> int:
        """Return the number of targets that are not ignored."""
        return int((batch.targets != IGNORE).sum())

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Return the cross entropy summed over the targets, in nats."""
        batch = batch.to(self._device, non_blocking=True)
        if self._pieces is not None:
            pieces = Pieces(self._pieces, batch.continues, batch.passes, batch.whole_cu_seqlens)
            return model.loss(batch.input_ids, batch.targets, cu_seqlens=batch.cu_seqlens, pieces=pieces).sum
        loss_sum, self._carried = carried_loss(model.loss, batch, self._states_before(model, batch))
        return loss_sum

    def _states_before(self, model: Any, batch: Batch) -> ModelState | None:
        """Return the states that the sequences of a batch may start from."""
        own = self._options
        if own.initial_state == "zero":
            return self._carried
        check_states(model.state_spec(), own.initial_state)
        if own.initial_state == "passed":
            return self._carried
        # nothing can be fitted in the first step
        self._num_losses += 1
        if own.initial_state == "fitted-noise" and self._carried is None:
            return None
        assert batch.carry_to is not None
        return noise(
            model, None if own.initial_state == "noise" else self._carried, len(batch.carry_to), own.initial_state_std,
            self._seed, self._num_losses,
        )  # fmt: skip

    def step_skipped(self) -> None:
        """Reset the streams: a state that is not finite would corrupt all later steps."""
        self._carried = None

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Return `text_figures` of the held-out text, with the state carried through whole documents."""
        nats = 0.0
        carried: ModelState | None = None
        for batch in self._held_out:
            loss_sum, carried = carried_loss(model.loss, batch.to(self._device, non_blocking=True), carried)
            nats += loss_sum.item()
        return text_figures(nats, self._held_out.num_tokens, self._held_out.num_text_bytes, self._keeps_text)

    def sample(self, model: nn.Module) -> str | None:
        """Return the prompt with the model's continuation."""
        return None if self._sampler is None else self._sampler(model, self._options.sample_prompt)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data."""
        state = self._batches.state_dict()
        return state | {"num_losses": self._num_losses} if self._options.initial_state != "zero" else state

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the states carried to the next step."""
        return {} if self._carried is None else self._carried.tensors()

    def load_state(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore the position and the carried states."""
        self._batches.load_state_dict(state)
        self._num_losses = int(state.get("num_losses", 0))
        moved = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        self._carried = ModelState.from_tensors(moved) if moved else None


def carried_loss(
    loss: Callable[..., tuple[Tensor, Tensor, ModelState]], batch: Batch, carried: ModelState | None
) -> tuple[Tensor, ModelState | None]:
    """Return the loss of one batch, whose sequences may continue from carried states.

    Args:
        loss: the loss function of the model.
        batch: a packed batch on the model's device.
        carried: the states of the streams returned by the previous call; None at the start.

    Returns:
        The summed loss, and the detached states of the streams; None if the batch carries no state.
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
        nats: cross entropy summed over the targets.
        num_tokens: number of targets.
        num_text_bytes: UTF-8 bytes of the text behind the targets.
        keeps_text: whether decoding the tokens restores the text; otherwise bits per byte would favour the tokenizer.

    Returns:
        val_loss (nats per token), val_perplexity (its exp), val_bits_per_byte (comparable between tokenizers; None if
        the tokens lose text), val_tokens and val_text_bytes.
    """
    loss = nats / num_tokens
    return {
        "val_loss": loss,
        "val_perplexity": perplexity(loss),
        "val_bits_per_byte": nats / math.log(2) / num_text_bytes if keeps_text else None,
        "val_tokens": num_tokens,
        "val_text_bytes": num_text_bytes,
    }
