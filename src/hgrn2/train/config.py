"""Settings of training, checked when they are made."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from hgrn2.constraints import Ge, Gt, Le, Lt, check_fields
from hgrn2.errors import UserError, unknown_key_message

# more threads than any machine has; torch raises an obscure error for much larger values
_MAX_THREADS = 4096
# Muon's updates have a fixed size, and torch fails for rates beyond float32
_LARGEST_MUON_RATE = 1e6
# default length of the warmup
_MAX_WARMUP_STEPS = 100
BUDGETS = ("max_steps", "max_tokens", "max_time_s")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training: budget, batch, optimizer, schedule, validations and checkpoints.

    At least one budget is needed; with several, the run ends at the first that is used up, and the learning-rate
    schedule follows the largest used fraction.

    Example:
        >>> TrainConfig(max_steps=100, learning_rate=3e-3).num_warmup_steps
        10
    """

    max_steps: Annotated[int | None, Gt(0)] = None
    """Budget in optimizer steps."""
    max_tokens: Annotated[int | None, Gt(0)] = None
    """Budget in training tokens."""
    max_time_s: Annotated[float | None, Gt(0)] = None
    """Budget in wall-clock seconds; the run is not reproducible to the bit, because the schedule follows the clock."""

    batch_size: Annotated[int, Gt(0)] = 16
    """Sequences (examples, for some tasks) in one forward pass."""
    grad_accumulation: Annotated[int, Gt(0)] = 1
    """Forward passes per optimizer step; every target has the same weight in all of them."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for everything, or muon for the hidden matrices and adamw for the rest."""
    learning_rate: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: Annotated[float | None, Gt(0)] = None
    """Peak learning rate of Muon, scaled so that updates have the size of AdamW's (default: learning_rate)."""
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay of AdamW's running mean of the gradient."""
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay of AdamW's running mean of the squared gradient."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: Annotated[float, Ge(0)] = 0.1
    """Decoupled weight decay on matrices, embedding and head; never on norms, biases, or lower bounds."""
    clip_norm: Annotated[float, Ge(0)] = 1.0
    """Maximum norm of the gradient; 0: no clipping."""

    schedule: Literal["cosine", "wsd", "inverse-sqrt", "constant"] = "cosine"
    """Learning rate schedule after the warmup; wsd: stable, then decay to the end."""
    warmup_steps: Annotated[int | None, Ge(0)] = None
    """Steps in which the learning rate rises from zero (default: 100, at most a tenth of the budget)."""
    decay_fraction: Annotated[float | None, Gt(0), Le(1)] = None
    """Last fraction of the budget, over which wsd decays (default: 0.2)."""
    min_lr_fraction: Annotated[float | None, Ge(0), Lt(1)] = None
    """Final learning rate of cosine and wsd, as a fraction of the peak (default: 0.1)."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass; bfloat16 is autocast, with weights and optimizer in float32."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third more time."""
    compile: bool = False
    """Compile the layers with torch.compile: faster steps, half a minute of waiting at the start."""
    cuda_graph: bool = False
    """Capture a step in a CUDA graph: faster where launches take longer than the work, as in small models; GPU only."""
    shard: bool = False
    """Split weights, gradients and optimizer over the processes (FSDP2): less memory in each, more communication."""
    reshard: bool = True
    """With shard: free a layer's gathered weights after its forward pass, and gather them again to go back."""
    context_parallel: Annotated[int, Gt(0)] = 1
    """Processes that share every sequence, each with a piece of its tokens; divides the number of processes."""
    device: str = "auto"
    """Torch device, such as cpu or cuda:0; auto: the first GPU, or the CPU."""
    num_threads: Annotated[int | None, Gt(0), Le(_MAX_THREADS)] = None
    """Threads of torch on the CPU; another number changes the last bits of results (default: torch's choice)."""
    freeze: str = ""
    """Weights that are frozen at first: copied (all but the recurrent mixers' own) or patterns such as *.mlp.*."""
    unfreeze_every: Annotated[int | None, Ge(0)] = None
    """Steps of an interval whose mean loss is compared with the one before; 0: never unfreeze (default: 100)."""
    unfreeze_threshold: Annotated[float | None, Ge(0)] = None
    """Improvement between two intervals, in nats per token, below which frozen weights are unfrozen (default: 0.02)."""

    unfrozen_lr_fraction: Annotated[float | None, Gt(0)] = None
    """Learning rate of unfrozen weights as a fraction of the others', after a separate warmup (default: 0.1)."""

    seed: Annotated[int, Ge(0), Lt(2**64)] = 0
    """Seed of the weights, the data order and the dropout."""

    validation_every: Annotated[int, Ge(0)] = 250
    """Steps between validations; 0: only at the end."""
    checkpoint_every: Annotated[int, Ge(0)] = 500
    """Steps between checkpoints; 0: only at the end. A new best validation also writes one."""
    keep_last: Annotated[int, Gt(0)] = 2
    """Number of newest checkpoints to keep, besides the best one."""
    sample_every: Annotated[int, Ge(0)] = 0
    """Steps between text samples; 0: only at the end."""
    record_every: Annotated[int, Gt(0)] = 1
    """Steps between records of training; a GPU is waited for that often, which is most of the time of a tiny model."""
    stop_at: float | None = None
    """End the run at a validation whose metric reaches this value, such as 0.999 (default: only the budget ends it)."""
    save_best: bool = True
    """Write a checkpoint at every new best validation."""
    report: bool = True
    """Write report.html and plots at the end; hgrn2 plot writes them later."""
    max_nonfinite: Annotated[int, Gt(0)] = 10
    """Number of consecutive steps with a non-finite loss or gradient (each is skipped) after which the run stops."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder, besides metrics.jsonl."""

    def __post_init__(self) -> None:
        check_fields(self, "train config")
        if self.max_steps is None and self.max_tokens is None and self.max_time_s is None:
            raise UserError("train config: no budget; set max_steps, max_tokens or max_time_s", "incomplete")
        muon_rate = self.muon_learning_rate or self.learning_rate
        if self.optimizer == "muon" and muon_rate > _LARGEST_MUON_RATE:
            raise UserError(f"train config: Muon's learning rate is {muon_rate}; wanted at most {_LARGEST_MUON_RATE:g}")
        if self.schedule == "inverse-sqrt" and self.num_warmup_steps == 0:
            raise UserError(
                "train config: schedule inverse-sqrt decays from the end of the warmup; set warmup_steps",
                "contradiction",
            )
        excluded = {
            "grad_accumulation": self.grad_accumulation > 1,
            "freeze": bool(self.freeze),
            "optimizer muon": self.optimizer == "muon",
        }
        if self.cuda_graph and any(excluded.values()):
            named = " and ".join(name for name, is_set in excluded.items() if is_set)
            raise UserError(f"train config: cuda_graph cannot be used with {named}; leave one out", "contradiction")
        if self.cuda_graph and self.shard:
            raise UserError("train config: cuda_graph cannot be used with shard; leave one out", "contradiction")
        self._warn_without_effect()

    def _warn_without_effect(self) -> None:
        is_never_unfrozen = not self.freeze or self.unfreeze_every == 0
        never_unfrozen = "weights that are never frozen or unfrozen"
        without_effect = {
            "muon_learning_rate": (self.optimizer != "muon", f"optimizer {self.optimizer}"),
            "decay_fraction": (self.schedule != "wsd", f"schedule {self.schedule}"),
            "min_lr_fraction": (self.schedule not in ("cosine", "wsd"), f"schedule {self.schedule}"),
            "unfreeze_every": (not self.freeze, never_unfrozen),
            "unfreeze_threshold": (is_never_unfrozen, never_unfrozen),
            "unfrozen_lr_fraction": (is_never_unfrozen, never_unfrozen),
        }
        for name, (is_idle, reason) in without_effect.items():
            if is_idle and getattr(self, name) is not None:
                warnings.warn(f"train config: {name} has no effect with {reason}", UserWarning, stacklevel=4)

    @property
    def num_warmup_steps(self) -> int:
        """warmup_steps, or the default that follows from max_steps."""
        return self.default_warmup_steps(None) if self.warmup_steps is None else self.warmup_steps

    def default_warmup_steps(self, tokens_per_step: int | None) -> int:
        """Return the default of warmup_steps: 100, but at most a tenth of the budget.

        Args:
            tokens_per_step: tokens per optimizer step; None ignores max_tokens.
        """
        # the shape of inverse-sqrt depends on the warmup, and must not depend on the budget
        if self.schedule == "inverse-sqrt":
            return _MAX_WARMUP_STEPS
        steps = [_MAX_WARMUP_STEPS]
        if self.max_steps is not None:
            steps.append(self.max_steps // 10)
        if self.max_tokens is not None and tokens_per_step is not None:
            steps.append(self.max_tokens // tokens_per_step // 10)
        return min(steps)

    def resolved(self, tokens_per_step: int) -> TrainConfig:
        """Return the settings with defaults that depend on the budget replaced by numbers.

        They then stay the same when the run is resumed with a longer budget. A warmup longer than the budget is
        shortened with a warning.

        Args:
            tokens_per_step: tokens per optimizer step.
        """
        steps = self.default_warmup_steps(tokens_per_step) if self.warmup_steps is None else self.warmup_steps
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
                f"train config: a warmup of {self.warmup_steps} steps is longer than max_steps {self.max_steps}; "
                f"lowered to {steps}",
                UserWarning,
                stacklevel=2,
            )
        return replace(self, warmup_steps=steps)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain numbers and strings."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> TrainConfig:
        """Return the config with these settings and the defaults for the rest.

        Raises:
            UserError: a key does not exist (the message names near matches), or a value is invalid.
        """
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise UserError(unknown_key_message("train config", key, known), "unknown-name")
        return cls(**settings)
