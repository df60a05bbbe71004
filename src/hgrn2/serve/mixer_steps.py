"""The decode step of a mixer: one token of each row, the state changed in place.

`MixerStep` is the seam for faster steps. `GenericStep` runs every mixer through its `forward`; `HGRN2Step` needs one
product for q, f and i, and runs the operator's step on the rows of the pool. A kernel that fuses more, or a state that
is written every n-th token (`hgrn2.serve.replay`), is one more class and a line in `step_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hgrn2.nn.mixers.base import Context, Mixer, MixerState, wide_dtype
from hgrn2.nn.mixers.hgrn2 import HGRN2
from hgrn2.ops import hgrn2_step
from hgrn2.ops.backends.reference import tied_gate
from hgrn2.ops.gates import activate
from hgrn2.serve.row_linear import linear_rows, project_rows


class MixerStep(Protocol):
    """Protocol of the decode step of one layer's mixer."""

    def __call__(self, x: Tensor, state: MixerState, context: Context) -> tuple[Tensor, MixerState | None]:
        """Run one token of each row.

        Args:
            x: [B, D], after the norm.
            state: tensors [B, ...] by name, changed in place.
            context: of a step, with the layer's lower bound.

        Returns:
            y [B, D], and features for later layers or None.
        """
        ...


class GenericStep:
    """The step of any mixer, through its `forward`; the new state is copied over the old one.

    Args:
        mixer: the mixer.
        growing: names of the tensors whose places fill from the end.
    """

    def __init__(self, mixer: nn.Module, growing: frozenset[str]):
        self.mixer, self.growing = mixer, growing

    def __call__(self, x: Tensor, state: MixerState, context: Context) -> tuple[Tensor, MixerState | None]:
        """Run one token of each row."""
        y, new, *features = self.mixer(x.unsqueeze(1), dict(state), context)
        for name, old in state.items():
            value = new[name]
            if name in self.growing:
                # one place more: the oldest, which is unused unless the row is full, leaves
                value = value[:, value.shape[1] - old.shape[1] :]
            old.copy_(value)
        return y.squeeze(1), features[0] if features else None


class HGRN2Step:
    """The step of HGRN2 with positive gates and a tied key, without convolutions.

    Args:
        mixer: the mixer; the weights of its projections become views of one tensor, with the same values.
    """

    def __init__(self, mixer: HGRN2):
        self.mixer = mixer
        self.weight, self.bias = join_projections([mixer.q_proj, mixer.f_proj, mixer.i_proj])

    def __call__(self, x: Tensor, state: MixerState, context: Context) -> tuple[Tensor, MixerState | None]:
        """Run one token of each row."""
        q, f, v = self.project(x)
        y = self.recur(q, f, v, state["recurrent"], self.bound(context))
        return self.finish(y), None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the pre-activations of rows x [B, D], each [B, H, K]."""
        return self.split(linear_rows(x, self.weight, self.bias))

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, f and v [B, H, K] as views of their product [B, 3 D]."""
        q, f, v = projected.view(projected.shape[0], 3, self.mixer.num_heads, self.mixer.expand_ratio).unbind(1)
        return q, f, v

    def bound(self, context: Context) -> Tensor | None:
        """Return the lower bound [H, K] of the layer."""
        bound = context.lower_bound
        return None if bound is None else bound.view(self.mixer.num_heads, self.mixer.expand_ratio)

    def recur(self, q: Tensor, f: Tensor, v: Tensor, state: Tensor, bound: Tensor | None) -> Tensor:
        """Run the recurrence on state [B, H, K, V] in place; return y [B, H, V] in q's dtype."""
        mixer = self.mixer
        if q.is_cuda:
            y, _ = hgrn2_step(
                q, f, v, state, bound, scale=mixer.scale, q_activation=mixer.q_activation,
                v_activation=mixer.v_activation, inplace=True, backend=mixer.backend,
            )  # fmt: skip
            return y
        # the operator's step makes three temporary tensors of the size of the state
        return self.advance(*self.operands(q, f, v, bound), state).to(q.dtype)

    def operands(self, q: Tensor, f: Tensor, v: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return query, gate, key and value [B, H, K] of pre-activations, float32 or wider."""
        mixer, wide = self.mixer, wide_dtype(q.dtype)
        gate, key = tied_gate(f.to(wide), None if bound is None else bound.to(wide))
        query = activate(q.to(wide), mixer.q_activation) * mixer.scale
        return query, gate, key, activate(v.to(wide), mixer.v_activation)

    def advance(self, query: Tensor, gate: Tensor, key: Tensor, value: Tensor, state: Tensor) -> Tensor:
        """Run the recurrence on state [B, H, K, V] in place, in torch; return y [B, H, V]."""
        state.mul_(gate.unsqueeze(-1)).addcmul_(key.unsqueeze(-1), value.unsqueeze(-2))
        return torch.matmul(query.unsqueeze(-2), state).squeeze(-2)

    def finish(self, y: Tensor) -> Tensor:
        """Normalise outputs y [B, H, V] and project them to [B, D]."""
        return project_rows(self.mixer.o_proj, self.mixer.g_norm(y.flatten(1)))


def step_of(mixer: Mixer, growing: frozenset[str]) -> MixerStep:
    """Return the fastest decode step of a mixer.

    Args:
        mixer: the mixer.
        growing: names of the tensors of its state that grow.
    """
    if (
        type(mixer) is HGRN2
        and mixer.has_tied_scan
        and not mixer.conv_size
        and can_join([mixer.q_proj, mixer.f_proj, mixer.i_proj])
    ):
        return HGRN2Step(mixer)
    return GenericStep(mixer, growing)


def can_join(projections: Sequence[Any]) -> bool:
    """Return whether projections are plain: no adapter, hook or quantised weight, and biases of all or none."""
    plain = all(
        type(p) is nn.Linear
        and type(p.weight) is nn.Parameter
        and not p._forward_hooks
        and not p._forward_pre_hooks
        and not p.weight.is_meta
        for p in projections
    )
    return plain and len({(p.bias is None, p.weight.dtype, p.weight.device) for p in projections}) == 1


@torch.no_grad()
def join_projections(projections: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of one product in place of several; the projections keep views of them.

    Args:
        projections: plain projections of the same input; their weights keep their values, and are trained and saved
            as before.
    """
    weight = _join([p.weight for p in projections])
    return weight, None if projections[0].bias is None else _join([p.bias for p in projections])


def _join(parameters: Sequence[Tensor]) -> Tensor:
    """Return a tensor of which the parameters are views, one after the other; make it if there is none."""
    first, place = parameters[0], parameters[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for x in parameters:
        if x.data_ptr() != place or x.untyped_storage().data_ptr() != storage or not x.is_contiguous():
            break
        place += x.nbytes
    else:
        rows = sum(x.shape[0] for x in parameters)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    joined = torch.cat([x.detach() for x in parameters])
    start = 0
    for x in parameters:
        x.data = joined[start : start + x.shape[0]]
        start += x.shape[0]
    return joined
