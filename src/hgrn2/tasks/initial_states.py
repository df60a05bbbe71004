"""Initial states of training sequences that resemble the states of long texts (arXiv 2507.02782)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from hgrn2.data.batches import Batch
from hgrn2.data.permutation import keyed_integer
from hgrn2.errors import UserError
from hgrn2.models import ModelState
from hgrn2.nn.mixers import StateSpec

InitialState = Literal["zero", "passed", "noise", "fitted-noise"]


def start_from_others(batch: Batch, seq_len: int, share: float, seed: int, position: int) -> Batch:
    """Return a packed batch in which some sequences start from final states of the previous step.

    Every window carries the state of its last sequence to the next step. Sequences draw states at random, with
    replacement; the draws depend on the seed and the position only.

    Args:
        batch: windows of seq_len tokens, packed.
        seq_len: tokens of a window.
        share: probability that a sequence does not start from zeros.
        seed: seed of the choice.
        position: number of the batch.
    """
    assert batch.cu_seqlens is not None
    bounds = batch.cu_seqlens.numpy()
    num_windows = batch.input_ids.shape[1] // seq_len
    random = np.random.default_rng([keyed_integer("initial states", seed), position])
    chosen = random.integers(num_windows, size=len(bounds) - 1)
    chosen[random.random(len(chosen)) >= share] = -1
    # the last token of a window is in its last sequence
    last = np.searchsorted(bounds, np.arange(1, num_windows + 1) * seq_len, side="left") - 1
    return replace(batch, carry_from=torch.from_numpy(chosen), carry_to=torch.from_numpy(last))


def check_states(specs: Sequence[Mapping[str, StateSpec]], kind: str) -> None:
    """Refuse a model whose layers cache tokens, since these belong to one text.

    Args:
        specs: from the model's `state_spec`.
        kind: the setting `initial_state`.

    Raises:
        UserError: a layer has a cache that grows.
    """
    caching = [layer for layer, found in enumerate(specs) if any(spec.grows for spec in found.values())]
    if caching:
        raise UserError(
            f"train config: initial_state is {kind!r}, and layers {', '.join(map(str, caching))} keep the tokens of a "
            "text (attention); wanted 'zero', or a model whose layers have states of a fixed size",
            "contradiction",
        )


def noise(model: Any, fitted_to: ModelState | None, num: int, std: float, seed: int, position: int) -> ModelState:
    """Return random states: normal with mean 0, or with the mean and standard deviation of each tensor of other states.

    Args:
        model: the model.
        fitted_to: the states to imitate; None for a mean of 0 and the deviation `std`.
        num: number of states.
        std: standard deviation.
        seed: seed of the numbers.
        position: number of the batch.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(keyed_integer("noise", seed, position) % 2**63)

    def draw(spec: StateSpec, like: torch.Tensor | None) -> torch.Tensor:
        drawn = torch.randn((num, *spec.shape), generator=generator, device=device, dtype=torch.float32)
        drawn = drawn * std if like is None else like.float().mean() + drawn * like.float().std(correction=0)
        return drawn.to(spec.dtype)

    layers = [{} for _ in model.state_spec()] if fitted_to is None else fitted_to.layers
    return ModelState(
        tuple(
            {name: draw(spec, like.get(name)) for name, spec in specs.items()}
            for specs, like in zip(model.state_spec(), layers, strict=True)
        )
    )
