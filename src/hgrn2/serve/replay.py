"""Decoding that writes the state every n-th token and reads it in between, with the last inputs beside it.

A decode step reads and writes the state, which at large batches is most of what it moves. With a checkpoint S_c of the
state and a ring of the pre-activations of the tokens since, t - c = m of them, an output needs no new state:

    y_t = scale * ((q_t * P_c)^T S_c + sum_{c < j <= t} (q_t * P_j . k_j) v_j)        P_j = F_{j+1} * ... * F_t

and every n-th token the state is written: S_t = Diag(P_c) S_c + sum_j (P_j * k_j) v_j^T. Published for Mamba-2 and
gated DeltaNet as ReplaySSM; since k_j = 1 - F_j here, the ring holds f and v only. The products P_j are of gates of at
most n tokens, from the last one backwards, so that nothing is divided.

These functions are the reference for a kernel, which would keep the ring of a head on the chip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from hgrn2.nn.mixers.base import MixerState, wide_dtype
from hgrn2.nn.mixers.hgrn2 import HGRN2
from hgrn2.ops.backends.reference import tied_gate
from hgrn2.ops.gates import activate
from hgrn2.serve.mixer_steps import HGRN2Step
from hgrn2.shapes import BHK, BHKV, BHV, HK

# M: tokens in the ring
RingGates = Annotated[Tensor, "B M H K"]
RingValues = Annotated[Tensor, "B M H V"]


class ReplaySettings(NamedTuple):
    """Settings of the recurrence, as of `hgrn2.ops.hgrn2_step`."""

    scale: float = 1.0
    q_activation: str = "silu"
    v_activation: str = "none"


def replay_output(
    q: BHK, ring_f: RingGates, ring_v: RingValues, checkpoint: BHKV, lower_bound: HK | None, settings: ReplaySettings
) -> BHV:
    """Compute the output of the last token in the ring, the state unchanged.

    Args:
        q: [B, H, K], pre-activation of the query of the last token.
        ring_f: [B, M, H, K], pre-activations of the forget gates since the checkpoint, M at least 1.
        ring_v: [B, M, H, V], the inputs since the checkpoint.
        checkpoint: [B, H, K, V], the state before the first token in the ring, float32 or wider.
        lower_bound: [H, K], or None.
        settings: settings of the recurrence.

    Returns:
        y [B, H, V] in q's dtype.
    """
    whole, weights, values = _replayed(ring_f, ring_v, lower_bound, settings)
    query = activate(q.to(whole.dtype), settings.q_activation) * settings.scale
    y = torch.matmul((query * whole).unsqueeze(-2), checkpoint).squeeze(-2)
    scores = (weights * query.unsqueeze(1)).sum(-1, keepdim=True)
    return (y + (scores * values).sum(1)).to(q.dtype)


def replay_state(
    ring_f: RingGates, ring_v: RingValues, checkpoint: BHKV, lower_bound: HK | None, settings: ReplaySettings
) -> BHKV:
    """Write the state after the last token in the ring over the checkpoint, and return it.

    Args:
        ring_f: as for `replay_output`.
        ring_v: as for `replay_output`.
        checkpoint: as for `replay_output`; changed in place.
        lower_bound: [H, K], or None.
        settings: settings of the recurrence.
    """
    whole, weights, values = _replayed(ring_f, ring_v, lower_bound, settings)
    # [B, H, K, M] x [B, H, M, V]
    update = torch.matmul(weights.permute(0, 2, 3, 1), values.transpose(1, 2))
    return checkpoint.mul_(whole.unsqueeze(-1)).add_(update)


def _replayed(
    ring_f: Tensor, ring_v: Tensor, lower_bound: Tensor | None, settings: ReplaySettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Return P_c [B, H, K], the keys times their P_j [B, M, H, K], and the values [B, M, H, V]."""
    wide = wide_dtype(ring_f.dtype)
    gate, key = tied_gate(ring_f.to(wide), None if lower_bound is None else lower_bound.to(wide))
    later = torch.cat([gate[:, 1:], torch.ones_like(gate[:, :1])], 1)
    # products from the last token backwards
    after = later.flip(1).cumprod(1).flip(1)
    return after[:, 0] * gate[:, 0], after * key, activate(ring_v.to(wide), settings.v_activation)


class ReplayStep(HGRN2Step):
    """The decode step of HGRN2 with a ring; the rows of a batch are the first ones, and the ring is theirs.

    Args:
        mixer: the mixer.
        num_rows: the largest batch.
        write_every: tokens in the ring when the state is written.
    """

    def __init__(self, mixer: HGRN2, num_rows: int, write_every: int):
        super().__init__(mixer)
        shape = (num_rows, write_every, mixer.num_heads, mixer.expand_ratio)
        self._ring_f, self._ring_v = (self.weight.new_zeros(shape) for _ in range(2))
        self._count = 0
        self._bound: Tensor | None = None
        self._settings = ReplaySettings(mixer.scale, mixer.q_activation, mixer.v_activation)

    def recur(self, q: Tensor, f: Tensor, v: Tensor, state: Tensor, bound: Tensor | None) -> Tensor:
        """Run the recurrence; state [B, H, K, V] is written every n-th time."""
        count, self._bound = q.shape[0], bound
        self._ring_f[:count, self._count] = f
        self._ring_v[:count, self._count] = v
        self._count += 1
        used = slice(self._count)
        y = replay_output(q, self._ring_f[:count, used], self._ring_v[:count, used], state, bound, self._settings)
        if self._count == self._ring_f.shape[1]:
            self.flush(state)
        return y

    def flush(self, state: Tensor) -> None:
        """Write the state [B, H, K, V] of the batch, and empty the ring."""
        if self._count:
            used, count = slice(self._count), state.shape[0]
            replay_state(self._ring_f[:count, used], self._ring_v[:count, used], state, self._bound, self._settings)
            self._count = 0


def flush_rings(steps: Sequence[object], states: Sequence[MixerState]) -> None:
    """Write the states of all layers whose steps have a ring.

    Args:
        steps: the mixer's step of each layer.
        states: for each layer the tensors of the rows of the batch.
    """
    for step, state in zip(steps, states, strict=True):
        if isinstance(step, ReplayStep):
            step.flush(state["recurrent"])
