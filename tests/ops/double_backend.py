"""A backend from outside the package: the chunkwise form in float64, whatever the dtype of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from hgrn2.ops.backends import Backend, find
from hgrn2.ops.call import CallTraits, ScanCall, ScanGradients


class DoubleBackend(Backend):
    """Counts its calls."""

    name = "double"

    def __init__(self):
        self.calls = {"forward": 0, "backward": 0, "step": 0}

    def rejects(self, traits: CallTraits) -> str | None:
        return None if traits.dtype == torch.float32 else f"it does not take {traits.dtype}"

    def forward(self, call: ScanCall, plan: int) -> tuple[Tensor, Tensor, Tensor | None]:
        self.calls["forward"] += 1
        y, state, _ = find("chunked").forward(in_float64(call), -1)
        return y.float(), state.float(), None

    def backward(
        self, call: ScanCall, plan: int, kept: Tensor | None, dy: Tensor, d_final_state: Tensor | None,
        bound_wanted: bool,
    ) -> ScanGradients:  # fmt: skip
        self.calls["backward"] += 1
        d_final_state = None if d_final_state is None else d_final_state.double()
        wide = find("chunked").backward(in_float64(call), -1, None, dy.double(), d_final_state, bound_wanted)
        return ScanGradients(*(None if x is None else x.float() for x in wide))

    def step(self, call: ScanCall, in_place: bool) -> tuple[Tensor, Tensor]:
        self.calls["step"] += 1
        return find("chunked").step(call, in_place)


def in_float64(call: ScanCall) -> ScanCall:
    tensors = (x.double() if x is not None and x.is_floating_point() else x for x in call[:-1])
    return ScanCall(*tensors, call.settings)
