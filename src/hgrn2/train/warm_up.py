"""Compiles kernels and imports the compiler in the background, while the weights of a large model are drawn."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from hgrn2.models import HGRN2Config
from hgrn2.nn.mixers.base import Context
from hgrn2.train.config import TrainConfig

# tokens of the two packed sequences that each kind of mixer reads
_LENGTH = 64


@contextmanager
def warming_up(model: HGRN2Config | None, train: TrainConfig, device: torch.device) -> Iterator[None]:
    """Prepare the first step in another thread inside; ends when it is prepared.

    The CPU's random numbers stay as they are. A GPU's do not, so they must be seeded afterwards.

    Args:
        model: the model that is being built; None prepares what no model is needed for.
        train: precision and compile are read.
        device: where the model will be.
    """

    def prepare() -> None:
        # a failure here comes again in the first step, where it is reported
        with suppress(Exception):
            if device.type == "cuda" and model is not None:
                run_mixers(model, train, device)
            if train.compile:
                importlib.import_module("torch._inductor.compile_fx")

    if device.type != "cuda" and not train.compile:
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
