"""Scans chunk by chunk in plain torch, on any device and for any dtype and width."""

from __future__ import annotations

from torch import Tensor

from hgrn2.ops.backends.base import Backend
from hgrn2.ops.backends.chunked import scan
from hgrn2.ops.backends.reference import step_in_torch
from hgrn2.ops.call import CallTraits, ScanCall, ScanGradients
from hgrn2.ops.tiles import chunks_per_tile


class ChunkedBackend(Backend):
    """The chunkwise form. Its plan is the number of chunks in a tile, negative where no states are kept."""

    name = "chunked"

    def rejects(self, traits: CallTraits) -> str | None:
        """Return None: it runs every call."""
        return None

    def plan(self, call: ScanCall, needs_grad: bool) -> tuple[ScanCall, int]:
        """Return the call and the number of chunks in a tile."""
        q, v = call.q, call.v
        tile_chunks = chunks_per_tile(q.shape[2], max(q.shape[3], v.shape[3]), q.dtype, q.device)
        return call, tile_chunks if needs_grad else -tile_chunks

    def kept_shape(self, call: ScanCall, plan: int) -> tuple[int, ...]:
        """Return the shape of the states between tiles."""
        return scan.kept_states_shape(call, plan) if plan > 0 else (0,)

    def forward(self, call: ScanCall, plan: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scan tile by tile."""
        return scan.forward(call, abs(plan), keep_states=plan > 0)

    def backward(
        self, call: ScanCall, plan: int, kept: Tensor | None, dy: Tensor, d_final_state: Tensor | None,
        bound_wanted: bool,
    ) -> ScanGradients:  # fmt: skip
        """Gradient of `forward`."""
        return scan.backward(call, abs(plan), kept if plan > 0 else None, dy, d_final_state)

    def step(self, call: ScanCall, in_place: bool) -> tuple[Tensor, Tensor]:
        """Run one token."""
        return step_in_torch(call, in_place)
