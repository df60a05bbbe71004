"""Freeze weights at first, and unfreeze them when the others have adapted (staged unfreezing, arXiv 2404.02684)."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hgrn2.errors import UserError
from hgrn2.models import HGRN2LM
from hgrn2.nn.mixers import HGRN2
from hgrn2.train.config import TrainConfig

COPIED = "copied"
UNFREEZE_EVERY, UNFREEZE_THRESHOLD, LR_FRACTION = 100, 0.02, 0.1


class Freezing:
    """Freezes parameters, and unfreezes them when the loss improves too little from one interval to the next.

    A frozen parameter has no gradient, so the optimizer skips it: no update, no decay, no state. It is unfrozen after
    an interval of `unfreeze_every` steps whose mean loss is less than `unfreeze_threshold` below that of the interval
    before. Its learning rate then rises over the steps of the warmup to `unfrozen_lr_fraction` of the others', because
    the first steps of an optimizer without history are large.

    Args:
        model: the model, whose parameters' requires_grad is set.
        names: names of the parameters to freeze.
        config: training settings, of which unfreeze_every, unfreeze_threshold, unfrozen_lr_fraction and warmup_steps
            are used.
    """

    def __init__(self, model: nn.Module, names: Collection[str], config: TrainConfig) -> None:
        parameters = dict(model.named_parameters())
        self._parameters = [parameters[name] for name in names]
        self._every = UNFREEZE_EVERY if config.unfreeze_every is None else config.unfreeze_every
        self._threshold = UNFREEZE_THRESHOLD if config.unfreeze_threshold is None else config.unfreeze_threshold
        self._lr_fraction = LR_FRACTION if config.unfrozen_lr_fraction is None else config.unfrozen_lr_fraction
        self._num_warmup_steps = config.num_warmup_steps
        self._freeze = config.freeze
        self._loss_sum, self._num_steps, self._num_free_steps = 0.0, 0, 0
        self._mean_before: float | None = None
        self._set(bool(names))

    def _set(self, frozen: bool) -> None:
        self.frozen = frozen
        for parameter in self._parameters:
            parameter.requires_grad_(not frozen)

    def count(self, loss: float) -> bool:
        """Record the loss of a step; return True if it unfreezes the parameters.

        Args:
            loss: loss of the step, in nats per target.
        """
        if not self.frozen:
            self._num_free_steps += 1
        if not self.frozen or self._every == 0:
            return False
        self._loss_sum += loss
        self._num_steps += 1
        if self._num_steps < self._every:
            return False
        mean, before = self._loss_sum / self._num_steps, self._mean_before
        self._loss_sum, self._num_steps, self._mean_before = 0.0, 0, mean
        if before is None or before - mean >= self._threshold:
            return False
        self._set(False)
        return True

    def lr_fraction(self) -> float:
        """Return the learning rate of unfrozen parameters in the next step, as a fraction of the others'."""
        return self._lr_fraction * min(1.0, (self._num_free_steps + 1) / max(1, self._num_warmup_steps))

    def state_dict(self) -> dict[str, Any]:
        """Return the stage and the position in the interval, as JSON values."""
        return {
            "freeze": self._freeze,
            "frozen": self.frozen,
            "loss_sum": self._loss_sum,
            "num_steps": self._num_steps,
            "num_free_steps": self._num_free_steps,
            "mean_before": self._mean_before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict returned.

        Raises:
            UserError: it was saved with another setting of freeze, which has had its effect already.
        """
        # older checkpoints lack it
        if (before := state.get("freeze", self._freeze)) != self._freeze:
            raise UserError(
                f"freeze: saved with {before!r}, now it is {self._freeze!r}; resume with the same setting", "mismatch"
            )
        self._loss_sum, self._num_steps = state["loss_sum"], state["num_steps"]
        self._mean_before, self._num_free_steps = state["mean_before"], state["num_free_steps"]
        self._set(state["frozen"] and bool(self._parameters))


def frozen_names(model: nn.Module, freeze: str) -> list[str]:
    """Return the names of the parameters that a setting freezes.

    Args:
        model: whose parameters they are.
        freeze: "" for none; "copied" for those that a start from a Transformer copies: all but the lower bounds and,
            of recurrent mixers, all but the output projection; otherwise patterns of names, separated by commas, such
            as "model.embeddings.*,*.mlp.*".

    Raises:
        UserError: a pattern that no name fits, or nothing is left to learn.
    """
    names = [name for name, _ in model.named_parameters()]
    if freeze == COPIED:
        if not isinstance(model, HGRN2LM):
            raise UserError(
                "train config: freeze is copied, which concerns language models; wanted patterns of names",
                "unsupported",
            )
        new = {"model.lower_bounds"}
        for i, layer in enumerate(model.model.layers):
            if isinstance(layer.attn, HGRN2):
                own = (f"model.layers.{i}.attn.{name}" for name, _ in layer.attn.named_parameters())
                new |= {name for name in own if ".o_proj." not in name}
        frozen = [name for name in names if name not in new]
    else:
        patterns = [pattern.strip() for pattern in freeze.split(",")] if freeze else []
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"train config: freeze: no parameter matches {pattern!r}; wanted {COPIED}, or patterns of names "
                    f"such as {names[0]} or *.mlp.*",
                    "unknown-name",
                )
        frozen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(names):
        raise UserError(f"train config: freeze is {freeze!r}, which leaves no weight to train; freeze less")
    return frozen
