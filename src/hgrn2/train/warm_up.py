"""Compile what the first step needs, in the background, while the weights of a large model are initialised."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

import torch
from torch import nn

from hgrn2.models import HGRN2Config
from hgrn2.models.pattern import DEFAULT_MIXER
from hgrn2.tasks.base import Task
from hgrn2.train.config import TrainConfig
from hgrn2.train.counters import Counters
from hgrn2.train.exclusive import is_side_by_side
from hgrn2.train.optim import NamedOptimizer
from hgrn2.train.parallel import ONE_PROCESS
from hgrn2.train.stepper import Stepper


@contextmanager
def warming_up(
    build_shallow: Callable[[], nn.Module] | None, task: Task, train: TrainConfig, device: torch.device
) -> Iterator[None]:
    """Return a context in which another thread trains a shallow model for one step; leaving it waits for the thread.

    All layers of the model reuse the kernels that this compiles. The random generator of the CPU is not used. That of a
    GPU is, so it must be seeded afterwards.

    Args:
        build_shallow: returns a model with one layer of each kind, on the device and ready to train; None to prepare
            only what does not depend on the model.
        task: the task of the run, whose position in the data does not change.
        train: training settings.
        device: device of the model.
    """

    def prepare() -> None:
        if device.type == "cuda" and device.index is not None:
            # a new thread begins with the first GPU
            torch.cuda.set_device(device)
        # the first step fails in the same way, and reports it
        with suppress(Exception):
            if train.compile:
                importlib.import_module("torch._inductor.compile_fx")
            if build_shallow is not None and device.type == "cuda":
                run_step(build_shallow(), task, train)

    # runs side by side compile one after the other, and share most kernels
    if is_side_by_side() or (device.type != "cuda" and not train.compile):
        yield
        return
    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def run_step(model: nn.Module, task: Task, train: TrainConfig) -> None:
    """Train a model for one step; the position of the task in its data does not change."""
    roles = model.parameter_roles()  # pyright: ignore[reportCallIssue]
    train = replace(train, cuda_graph=False, grad_accumulation=1)
    optimizer = NamedOptimizer(model, roles, train, waits_for_step=task.carries_state)
    stepper = Stepper(model, task, optimizer, train, ONE_PROCESS)
    position = task.state_dict(), task.state_tensors()
    model.train()
    try:
        with optimizer.working_precision():
            stepper.run(Counters(), train.learning_rate)
    finally:
        task.load_state(*position)


def one_layer_of_each(config: HGRN2Config) -> HGRN2Config:
    """Return a configuration with one layer of each mixer of a model."""
    names = tuple(dict.fromkeys(config.layer_mixers))
    options = {name: asdict(config.mixer_options(name)) for name in names if name != DEFAULT_MIXER}
    return config.replace(num_hidden_layers=len(names), layers=names, mixers=options)
