"""The token mixer of HGRN2 as a stand-alone layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hgrn2.errors import UserError
from hgrn2.nn.mixers.context import Context, MixerState
from hgrn2.nn.mixers.directions import refuse_state
from hgrn2.nn.mixers.hgrn2 import HGRN2
from hgrn2.ops.checks import check_bound_like, check_cu_seqlens, check_device
from hgrn2.shapes import describe


class HGRN2Mixer(HGRN2):
    """Gated linear recurrence with an outer-product state (arXiv 2404.07904, section 3), for models of your own.

        q = x W_q    z = x W_f    v = x W_i    y = scan(q, z, v)    out = Norm(y) W_o

    Takes the arguments of `hgrn2.nn.mixers.HGRN2`: hidden_size, and expand_ratio or num_heads; the others are optional.

    Example:
        >>> import torch
        >>> from hgrn2 import HGRN2Mixer
        >>> mixer = HGRN2Mixer(hidden_size=64, num_heads=4)
        >>> y, state = mixer(torch.randn(2, 10, 64), lower_bound=torch.full((64,), 0.5))
        >>> y, state = mixer(torch.randn(2, 1, 64), lower_bound=torch.full((64,), 0.5), state=state)
        >>> y.shape, state["recurrent"].shape
        (torch.Size([2, 1, 64]), torch.Size([2, 4, 16, 16]))
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        if self.dense_state:
            raise UserError(
                f"dense_state is {self.dense_state}; a layer on its own has no earlier layers, use hgrn2.HGRN2LM",
                "unsupported",
            )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        lower_bound: Tensor | None = None,
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        keep_state: bool = True,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, MixerState]:
        """Mix tokens; a single token after a state is computed in the step form.

        Args:
            x: [B, T, D], in the dtype of the weights unless autocast is on.
            lower_bound: [D], or [H, K] as the scan takes it; float32 in [0, 1). Channel d of [D] is channel d % K of
                head d // K. None means 0.
            state: state after the tokens before x, from an earlier call or `init_state`; None for the initial state.
            cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences (B = 1), or None.
            mask: [B, T], False or 0 where a token is padding, which leaves the state unchanged; or None.
            keep_state: whether to return the new state.
            grid: rows and columns of images, T = rows * columns, row by row; needed by the directions of a grid.

        Returns:
            y [B, T, D] and the new state ({} unless `keep_state`, and if the direction is not "causal").

        Raises:
            UserError: an argument does not fit x or the layer.
        """
        if self.direction != "causal":
            refuse_state(self.direction, state)
        self._check(x, lower_bound, state, cu_seqlens, mask)
        # a dynamic length of an exported program is not a step
        is_single = isinstance(x.shape[1], int) and x.shape[1] == 1
        is_step = state is not None and is_single and cu_seqlens is None
        mask = None if mask is None else mask.bool()
        context = Context(cu_seqlens, mask, keep_state, is_step, lower_bound, grid=grid)
        return super().forward(x, state, context)

    def _check(
        self,
        x: Tensor,
        lower_bound: Tensor | None,
        state: MixerState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> None:
        """Check the arguments of `forward`."""
        width = self.num_heads * self.expand_ratio
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != width:
            raise UserError(f"x is {describe(x)}; wanted a tensor [B, T, D] with D={width}")
        self._check_against_weights(x)
        if mask is not None:
            if cu_seqlens is not None:
                raise UserError(
                    "mask and cu_seqlens were both given; packed sequences have no padding, drop the mask",
                    "contradiction",
                )
            if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
                raise UserError(f"mask is {describe(mask)}; wanted a tensor {list(x.shape[:2])}, 0 where x is padding")
            check_device("mask", mask, "x", x)
        sequences = x.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x, False, "x")
            sequences = cu_seqlens.shape[0] - 1
        if state is not None:
            self._check_state(state, x, sequences)
        if lower_bound is None:
            return
        heads = (self.num_heads, self.expand_ratio)
        if not isinstance(lower_bound, Tensor) or lower_bound.shape not in ((width,), heads):
            raise UserError(
                f"lower_bound is {describe(lower_bound)}; wanted a tensor [D] = [{width}], or [H, K] = {list(heads)}"
            )
        check_bound_like("lower_bound", lower_bound, x, "x")

    def _check_against_weights(self, x: Tensor) -> None:
        linear = self.q_proj
        # adapters, quantised weights and offloaded weights check their own inputs
        if torch.compiler.is_compiling() or type(linear) is not nn.Linear or hasattr(linear, "_hf_hook"):
            return
        weight = linear.weight
        check_device("x", x, "the layer", weight)
        if x.dtype != weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            raise UserError(
                f"x has dtype {x.dtype}; the layer's weights have {weight.dtype}, convert one of them", "mismatch"
            )

    def _check_state(self, state: MixerState, x: Tensor, sequences: int) -> None:
        specs = self.state_spec(x.dtype)
        if not isinstance(state, dict) or not specs.keys() <= state.keys():
            found = sorted(state) if isinstance(state, dict) else describe(state)
            raise UserError(f"state is {found}; wanted a table with {', '.join(sorted(specs))}, as init_state gives it")
        for name, spec in sorted(specs.items()):
            shape = [sequences, *spec.shape]
            if not isinstance(state[name], Tensor) or list(state[name].shape) != shape:
                raise UserError(f"state: {name} is {describe(state[name])}; wanted a tensor {shape}")
            check_device(f"state: {name}", state[name], "x", x)
        check_bound_like("state: recurrent", state["recurrent"], x, "x")
