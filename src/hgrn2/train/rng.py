"""Save, restore and shield the random number generators of training."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hgrn2.train.exclusive import exclusive, is_side_by_side


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on every device."""
    with exclusive():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 third-party code uses the global generator
        torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the state of every generator as JSON values."""
    with exclusive():
        version, words, gauss_next = random.getstate()
        name, key, *rest = np.random.get_state()  # noqa: NPY002
        cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "python": [version, _encode(np.array(words, dtype=np.uint32)), gauss_next],
            "numpy": [name, _encode(np.asarray(key)), *rest],
            "torch": _encode(torch.get_rng_state().numpy()),
            "cuda": [_encode(state.numpy()) for state in cuda_states],
        }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the result of rng_state, also after a round trip through JSON.

    Raises:
        LookupError, TypeError, ValueError: the state is malformed.
    """
    with exclusive():
        version, words, gauss_next = state["python"]
        random.setstate((version, tuple(_decode(words, np.uint32).tolist()), gauss_next))
        name, key, *rest = state["numpy"]
        np.random.set_state((name, _decode(key, np.uint32), *rest))  # noqa: NPY002
        try:
            torch.set_rng_state(torch.from_numpy(_decode(state["torch"], np.uint8)))
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        # a run may resume on a machine with fewer GPUs
        for index, encoded in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(torch.from_numpy(_decode(encoded, np.uint8)), index)


def rng_state_of_seed(seed: int) -> dict[str, Any]:
    """Return the state of every generator after `seed_everything(seed)`; the generators stay as they are."""
    with exclusive():
        before = rng_state()
        seed_everything(seed)
        try:
            return rng_state()
        finally:
            set_rng_state(before)


@contextmanager
def shielded_rng(seed: int) -> Iterator[None]:
    """Seed the generators for the block and restore them afterwards, so that training is not affected."""
    if is_side_by_side():
        # other runs draw between the two, so there is nothing to restore; see hgrn2.train.exclusive
        yield
        return
    saved = rng_state()
    seed_everything(seed)
    try:
        yield
    finally:
        set_rng_state(saved)


def _encode(words: np.ndarray) -> str:
    return base64.b64encode(words.tobytes()).decode("ascii")


def _decode(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype)
