"""Measure the forget gates of a model on some text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2.nn.mixers.base import Context, MixerState
from hgrn2.nn.mixers.hgrn2 import HGRN2


@torch.no_grad()
def gate_statistics(model: Any, input_ids: Tensor, cu_seqlens: Tensor | None) -> list[dict[str, Any]]:
    """Measure the forget gates of the HGRN2 layers; the result is that of `HGRN2LM.gate_statistics`.

    Args:
        model: an `HGRN2LM`.
        input_ids: [B, T] int64.
        cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences, B = 1; or None.
    """
    statistics: list[dict[str, Any]] = []
    with _watch(model.model.layers, statistics):
        _, state = model.hidden_states(input_ids, None, cu_seqlens)
    for entry in statistics:
        recurrent = state.layers[entry["layer"]]["recurrent"]
        entry["state_norm"] = float(recurrent.flatten(2).norm(dim=-1).mean())
    return statistics


@contextmanager
def _watch(layers: nn.ModuleList, statistics: list[dict[str, Any]]) -> Iterator[None]:
    def watch(index: int) -> Any:
        def hook(mixer: HGRN2, args: tuple[Tensor, MixerState | None, Context]) -> None:
            x, state, context = args
            gate, bound = mixer.forget_gate(x, state, context), context.lower_bound
            shown = torch.zeros(gate.shape[-1]) if bound is None else bound
            statistics.append({"layer": index, "lower_bound": shown, "forget_gate": gate})

        return hook

    mixers: list[Any] = [layer.attn for layer in layers]
    handles = [mixer.register_forward_pre_hook(watch(i)) for i, mixer in enumerate(mixers) if isinstance(mixer, HGRN2)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
