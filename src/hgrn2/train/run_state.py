"""Collect the state of a run for a checkpoint, and restore it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hgrn2.constraints import check_fields
from hgrn2.errors import UserError
from hgrn2.formats.soundness import STATE_NAME
from hgrn2.tasks.base import Task
from hgrn2.train.checkpoint import Checkpoint, load_model_tensors, model_tensors
from hgrn2.train.counters import Counters, describe_changes
from hgrn2.train.environment import describe_environment
from hgrn2.train.freezing import Freezing
from hgrn2.train.optim import NamedOptimizer
from hgrn2.train.rng import rng_state, set_rng_state


@dataclass(frozen=True)
class Restored:
    """Result of restoring a checkpoint.

    Attributes:
        counters: counters of the checkpoint.
        num_records: records of metrics.jsonl up to the checkpoint; None if an older version wrote it.
        notes: notes about settings and machines that have changed since.
    """

    counters: Counters
    num_records: int | None
    notes: list[str]


@dataclass(frozen=True)
class RunState:
    """The parts of a run that a checkpoint holds.

    Attributes:
        model: the model, on its device.
        optimizer: optimizer of its parameters.
        task: the task, with its position in the data and carried tensors.
        freezing: which parameters are frozen.
        run_config: content of config.json.
    """

    model: nn.Module
    optimizer: NamedOptimizer
    task: Task
    freezing: Freezing
    run_config: Mapping[str, Any]

    @property
    def _device(self) -> torch.device:
        return self.optimizer.parameters[0].device

    def collect(self, counters: Counters, num_records: int) -> dict[str, Any]:
        """Return the arguments of `CheckpointStore.save`.

        Args:
            counters: counters of the run.
            num_records: records of metrics.jsonl so far.
        """
        return {
            "model": self.optimizer.full_precision(model_tensors(self.model)),
            "optimizer": self.optimizer.state_tensors(),
            "task": self.task.state_tensors(),
            "state": {
                **asdict(counters),
                "task": self.task.state_dict(),
                "freezing": self.freezing.state_dict(),
                "rng": rng_state(),
                "environment": describe_environment(self._device),
                "num_records": num_records,
            },
            "config": self.run_config,
            "best_step": counters.best["step"] if counters.best else None,
        }

    def restore(self, saved: Checkpoint) -> Restored:
        """Restore the state of a checkpoint, including the random generators.

        Raises:
            UserError: the checkpoint is damaged, or does not fit the model, the optimizer, the data or the settings.
        """
        with _corrupt_state_as_user_error(saved.path):
            return self._restore(saved)

    def _restore(self, saved: Checkpoint) -> Restored:
        state = saved.state
        load_model_tensors(self.model, saved.model, saved.path)
        self.optimizer.load_state_tensors(saved.optimizer)
        self.task.load_state(state["task"], saved.task)
        # older checkpoints lack it
        if "freezing" in state:
            self.freezing.load_state_dict(state["freezing"])
        counters = Counters(**{name: state[name] for name in asdict(Counters())})
        check_fields(counters, f"checkpoint {saved.path}, {STATE_NAME}")
        if (best := counters.best) is not None:
            name = self.task.metric.name
            counters.best = {"step": int(best["step"]), name: float(best[name])}
        set_rng_state(state["rng"])
        notes = describe_changes(saved.config, self.run_config, counters)
        before, now = state["environment"], describe_environment(self._device)
        if changed := [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]:
            notes.append(f"resuming in another environment ({', '.join(changed)}): losses may differ in the last bits")
        return Restored(counters, state.get("num_records"), notes)


@contextmanager
def _corrupt_state_as_user_error(checkpoint: Path) -> Iterator[None]:
    """Turn errors from a state.json with a valid checksum but invalid content into a UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"checkpoint {checkpoint}: {STATE_NAME} is not what a run writes ({reason}); name an older one",
            "damaged",
        ) from error
