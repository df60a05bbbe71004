"""Compile kernels and import the compiler in the background, while the weights of a large model are initialised."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from hgrn2.models import HGRN2Config
from hgrn2.nn.mixers.base import Context
from hgrn2.train.config import TrainConfig
from hgrn2.train.exclusive import is_side_by_side

# length of the two packed sequences that each kind of mixer runs on
_LENGTH = 64


@contextmanager
def warming_up(model: HGRN2Config | None, train: TrainConfig, device: torch.device) -> Iterator[None]:
    """Return a context during which another thread prepares the first step; it ends when that is done.

    The random generator of the CPU is not used. That of a GPU is, so it must be seeded afterwards.

    Args:
        model: configuration of the model being built; None to prepare only what does not depend on it.
        train: training settings, of which precision and compile are used.
        device: device of the model.
    """

    def prepare() -> None:
        # the first step fails in the same way, and reports it
        with suppress(Exception):
            if device.type == "cuda" and model is not None:
                run_mixers(model, train, device)
            if train.compile:
                importlib.import_module("torch._inductor.compile_fx")

    # runs side by side compile one after the other, and have mostly the same kernels
    if is_side_by_side() or (device.type != "cuda" and not train.compile):
        yield
        return
    thread = threading.Thread(target=prepare, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def run_mixers(model: HGRN2Config, train: TrainConfig, device: torch.device) -> None:
    """Run each kind of mixer forward and backward, which compiles the kernels it needs."""
    cu_seqlens = torch.tensor([0, _LENGTH, 2 * _LENGTH], dtype=torch.int32, device=device)
    low = torch.bfloat16 if train.precision == "bfloat16" else None
    for name in sorted(set(model.layer_mixers)):
        with torch.device(device):
            mixer = model.build_mixer(model.layer_mixers.index(name))
            x = torch.zeros(1, 2 * _LENGTH, model.hidden_size, requires_grad=True)
        context = Context(cu_seqlens=cu_seqlens if mixer.can_pack else None, keep_state=False)
        with torch.autocast(device.type, dtype=low, enabled=low is not None):
            y = mixer(x, None, context)[0]
        y.sum().backward()
