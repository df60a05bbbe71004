"""Every setting of a training run, checked when it is made."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from hgrn2.errors import UserError, check_types, unknown_key_message

_POSITIVE = [
    "max_steps",
    "max_tokens",
    "max_time_s",
    "batch_size",
    "seq_len",
    "grad_accumulation",
    "num_threads",
    "learning_rate",
    "muon_learning_rate",
    "distill_temperature",
    "unfrozen_lr_fraction",
    "eps",
    "validation_tokens",
    "keep_last",
    "max_nonfinite",
]
_NOT_NEGATIVE = [
    "weight_decay",
    "warmup_steps",
    "clip_norm",
    "unfreeze_every",
    "unfreeze_threshold",
    "validation_every",
    "checkpoint_every",
    "sample_every",
    "seed",
]
# more than any machine has; far beyond, torch cannot even be told
_MOST_THREADS = 4096
# of one step, whose batches are in memory at once
_MOST_TOKENS = 2**26
# Muon's updates all have one size; rates beyond float32 make torch fail
_LARGEST_MUON_RATE = 1e6
# the default warmup
_MOST_WARMUP_STEPS = 100
BUDGETS = ("max_steps", "max_tokens", "max_time_s")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training: budget, batch, optimizer, schedule, and what to record on the way.

    At least one budget is needed; with several, the run ends at the first that is used up, and the learning
    rate's schedule runs on the largest used fraction.

    Example:
        >>> TrainConfig(max_steps=100, learning_rate=3e-3).tokens_per_step
        16384
    """

    max_steps: int | None = None
    """Budget in optimizer steps."""
    max_tokens: int | None = None
    """Budget in training tokens."""
    max_time_s: float | None = None
    """Budget in wall-clock seconds; not repeatable to the bit, as the schedule then follows the clock."""

    batch_size: int = 16
    """Sequences in one forward pass."""
    seq_len: int = 1024
    """Tokens in one sequence."""
    grad_accumulation: int = 1
    """Forward passes summed into one optimizer step; every target weighs the same whatever pass it is in."""
    stream: bool = False
    """Carry the state across a document's windows (truncated backpropagation) instead of packing."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the hidden matrices and adamw for the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float | None = None
    """Peak learning rate of Muon, in AdamW's scale (updates of equal size) (default: learning_rate)."""
    beta1: float = 0.9
    """Decay of AdamW's running mean of the gradient."""
    beta2: float = 0.95
    """Decay of AdamW's running mean of the squared gradient."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices, embedding and head; never on norms, biases, or lower bounds."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""

    schedule: Literal["cosine", "wsd", "inverse-sqrt", "constant"] = "cosine"
    """Shape of the learning rate after the warmup; wsd: warmup, stable, decay to the end."""
    warmup_steps: int | None = None
    """Steps in which the learning rate rises from zero (default: 100, at most a tenth of the budget)."""
    decay_fraction: float | None = None
    """The last part of the budget, over which wsd decays (default: 0.2)."""
    min_lr_fraction: float | None = None
    """Learning rate that cosine and wsd go down to, as a fraction of the peak (default: 0.1)."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass; bfloat16 is autocast, with weights and optimizer in float32."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    compile: bool = False
    """Compile the layers with torch.compile: faster steps, half a minute of waiting at the start."""
    device: str = "auto"
    """Torch device, such as cpu or cuda:0; auto: the first GPU, or the CPU."""
    num_threads: int | None = None
    """Threads torch computes with on the CPU; another number changes the last bits (default: torch's choice)."""
    freeze: str = ""
    """Weights that wait: copied (all but the recurrent mixers' own) or patterns such as *.mlp.*; empty: none."""
    unfreeze_every: int | None = None
    """Steps of an interval, whose mean loss is compared with that of the one before; 0: never (default: 100)."""
    unfreeze_threshold: float | None = None
    """Improvement between two intervals, in nats per token, below which frozen weights are unfrozen (default: 0.02)."""

    unfrozen_lr_fraction: float | None = None
    """Learning rate of weights that were frozen, as a part of the others', after its own warmup (default: 0.1)."""
    teacher: str | None = None
    """A model of the same tokens to learn from beside the text: a run, or a folder as for --from."""
    distill_weight: float | None = None
    """Part of the loss that is the divergence from the teacher's predictions, 0 to 1 (default: 0.5)."""
    distill_temperature: float | None = None
    """What both models' logits are divided by in that part (default: 1)."""

    seed: int = 0
    """Seed of the weights, the data order and the dropout."""

    validation_every: int = 250
    """Steps between validations; 0: only at the end."""
    validation_tokens: int = 262_144
    """Tokens of the held-out text that a validation reads: always the same documents, chosen at random."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0: only at the end. A new best validation writes one as well."""
    keep_last: int = 2
    """Newest checkpoints that are kept, beside the best one."""
    sample_every: int = 0
    """Steps between samples of the model's writing; 0: only at the end."""
    sample_prompt: str = ""
    """Text that the samples continue; empty: the start of a document."""
    max_nonfinite: int = 10
    """Steps in a row with a non-finite loss or gradient, each skipped, after which the run stops."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder, beside metrics.jsonl."""

    def __post_init__(self) -> None:
        check_types(self, "train config")
        if self.max_steps is None and self.max_tokens is None and self.max_time_s is None:
            raise UserError("train config: no budget; set max_steps, max_tokens or max_time_s")
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            self._check_number(name, zero_allowed=name in _NOT_NEGATIVE)
        if self.seed >= 2**64:
            raise UserError(f"train config: seed is {self.seed}; wanted less than 2^64")
        if self.num_threads is not None and self.num_threads > _MOST_THREADS:
            raise UserError(f"train config: num_threads is {self.num_threads}; wanted at most {_MOST_THREADS}")
        if self.tokens_per_step > _MOST_TOKENS:
            raise UserError(
                f"train config: batch_size * seq_len * grad_accumulation is {self.tokens_per_step}; wanted at most "
                f"{_MOST_TOKENS} tokens per step"
            )
        if self.teacher is not None and (not self.teacher or "\0" in self.teacher):
            raise UserError(f"train config: teacher is {self.teacher!r}; wanted a run, or a folder with a model")
        temperature = self.distill_temperature
        if temperature is not None and not 0.01 <= temperature <= 1000:
            raise UserError(f"train config: distill_temperature is {temperature}; wanted 0.01 to 1000")
        muon_rate = self.muon_learning_rate or self.learning_rate
        if self.optimizer == "muon" and muon_rate > _LARGEST_MUON_RATE:
            raise UserError(f"train config: Muon's learning rate is {muon_rate}; wanted at most {_LARGEST_MUON_RATE:g}")
        try:
            self.sample_prompt.encode("utf-8")
        except UnicodeEncodeError:
            # found at the first sample otherwise, which may be at the end of the run
            raise UserError(f"train config: sample_prompt is {self.sample_prompt!r}; wanted UTF-8 text") from None
        for name, low, high in (("beta1", 0, 1), ("beta2", 0, 1), ("min_lr_fraction", 0, 1)):
            value = getattr(self, name)
            if value is not None and not (low <= value < high):
                raise UserError(f"train config: {name} is {value}; wanted {low} <= {name} < {high}")
        if self.distill_weight is not None and not 0 <= self.distill_weight <= 1:
            raise UserError(f"train config: distill_weight is {self.distill_weight}; wanted 0 to 1")
        if self.decay_fraction is not None and not 0 < self.decay_fraction <= 1:
            raise UserError(f"train config: decay_fraction is {self.decay_fraction}; wanted 0 < decay_fraction <= 1")
        for name, known in (
            ("optimizer", ("adamw", "muon")),
            ("schedule", ("cosine", "wsd", "inverse-sqrt", "constant")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"train config: {name} is {getattr(self, name)!r}; wanted {' or '.join(known)}")
        self._check_together()

    def _check_number(self, name: str, *, zero_allowed: bool) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if value < 0 or (value == 0 and not zero_allowed):
            wanted = "0 or more" if zero_allowed else "more than 0"
            raise UserError(f"train config: {name} is {value}; wanted {wanted}")
        # the seed has a bound of its own
        if isinstance(value, int) and value >= 2**63 and name != "seed":
            raise UserError(f"train config: {name} has {len(str(value))} digits; wanted less than 2^63")

    def _check_together(self) -> None:
        if self.schedule == "inverse-sqrt" and self.num_warmup_steps == 0:
            raise UserError("train config: schedule inverse-sqrt decays from the end of the warmup; set warmup_steps")
        if self.teacher is not None and self.stream:
            raise UserError("train config: a teacher reads packed documents; leave out stream, or the teacher")
        if self.max_tokens is not None and self.max_tokens < self.tokens_per_step:
            raise UserError(
                f"train config: max_tokens {self.max_tokens} is less than one step of {self.tokens_per_step} "
                "(batch_size * seq_len * grad_accumulation); raise it or shrink the batch"
            )
        without_effect = {
            "muon_learning_rate": self.optimizer != "muon",
            "decay_fraction": self.schedule != "wsd",
            "min_lr_fraction": self.schedule not in ("cosine", "wsd"),
            "distill_weight": self.teacher is None,
            "distill_temperature": self.teacher is None,
            "unfreeze_every": not self.freeze,
            "unfreeze_threshold": not self.freeze or self.unfreeze_every == 0,
            "unfrozen_lr_fraction": not self.freeze or self.unfreeze_every == 0,
        }
        others = {"muon_learning_rate": f"optimizer {self.optimizer}"}
        others |= dict.fromkeys(("decay_fraction", "min_lr_fraction"), f"schedule {self.schedule}")
        unfreezing = ("unfreeze_every", "unfreeze_threshold", "unfrozen_lr_fraction")
        others |= dict.fromkeys(unfreezing, "weights that are never frozen or unfrozen")
        others |= dict.fromkeys(("distill_weight", "distill_temperature"), "no teacher")
        for name, idle in without_effect.items():
            if idle and getattr(self, name) is not None:
                warnings.warn(f"train config: {name} has no effect with {others[name]}", UserWarning, stacklevel=4)

    @property
    def tokens_per_step(self) -> int:
        """Tokens one optimizer step reads."""
        return self.batch_size * self.seq_len * self.grad_accumulation

    @property
    def num_warmup_steps(self) -> int:
        """warmup_steps, or its default."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        # inverse-sqrt is the same whatever the budget, and its shape depends on the warmup
        if self.schedule == "inverse-sqrt":
            return _MOST_WARMUP_STEPS
        budgets = [self.max_steps, None if self.max_tokens is None else self.max_tokens // self.tokens_per_step]
        return min([_MOST_WARMUP_STEPS, *(steps // 10 for steps in budgets if steps is not None)])

    def resolved(self) -> TrainConfig:
        """The settings with which a run begins: defaults that depend on the budget become numbers of their own.

        They then stay the same when the run is resumed with a longer budget. A warmup that is longer than the budget is
        lowered, with a warning.
        """
        steps = self.num_warmup_steps
        if self.max_steps is None or steps <= self.max_steps:
            return replace(self, warmup_steps=steps)
        if self.warmup_steps is None:
            warnings.warn(
                f"train config: max_steps {self.max_steps} ends within the warmup of {steps} steps, the default of "
                f"schedule {self.schedule}; set warmup_steps",
                UserWarning,
                stacklevel=2,
            )
        else:
            steps = max(1, self.max_steps // 10)
            warnings.warn(
                f"train config: a warmup of {self.num_warmup_steps} steps is longer than max_steps {self.max_steps}; "
                f"lowered to {steps}",
                UserWarning,
                stacklevel=2,
            )
        return replace(self, warmup_steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain numbers and strings."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> TrainConfig:
        """The config with these settings and the defaults for the rest.

        Raises:
            UserError: for a key that does not exist (near matches are named) or a value that cannot be used.
        """
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise UserError(unknown_key_message("train config", key, known))
        return cls(**settings)
