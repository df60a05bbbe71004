"""The token mixer of HGRN2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hgrn2.nn.norm import Norm
from hgrn2.nn.short_conv import ShortConv
from hgrn2.ops import check_backend, hgrn2_scan, hgrn2_step
from hgrn2.ops.checks import check_bound_like, check_cu_seqlens, check_device, check_fixed_settings
from hgrn2.shapes import describe

# a pre-activation that makes the forget gate exactly 1 and the key exactly 0 in every dtype
_KEEP_STATE = 1e4

# the width of a head when nothing else is asked for
DEFAULT_EXPAND_RATIO = 128

MixerState = dict[str, Tensor]


class HGRN2Mixer(nn.Module):
    """Gated linear recurrence with an outer-product state (arXiv 2404.07904, section 3).

        q = x W_q    z = x W_f    v = x W_i    y = scan(q, z, v)    out = Norm(y) W_o

    The norm runs over all heads together.

    Args:
        hidden_size: D.
        expand_ratio: K = V, the width of a head's gate and value; the state of a head is expand_ratio x expand_ratio.
            None means D / num_heads, or 128 when num_heads is not given either.
        num_heads: heads, D / expand_ratio. Give one of the two; both must agree.
        q_activation: "silu", "sigmoid" or "none".
        v_activation: "none" or "silu".
        scale: factor of the scan's outputs; None means expand_ratio^-0.5, as in `hgrn2.HGRN2Config`.
        norm: "rmsnorm" or "layernorm".
        norm_eps: its eps.
        norm_affine: whether it has parameters.
        bias: whether the projections have biases.
        conv_size: taps of a short convolution on q, z and v; 0 for none.
        min_log_decay: smallest log decay while training (the key is not changed), or None.
        backend: "auto", or the name of one as for `hgrn2.ops.hgrn2_scan`.

    Raises:
        ValueError: sizes and settings that do not fit.

    Example:
        >>> import torch
        >>> from hgrn2 import HGRN2Mixer
        >>> mixer = HGRN2Mixer(hidden_size=64, num_heads=4)
        >>> y, state = mixer(torch.randn(2, 10, 64), lower_bound=torch.full((64,), 0.5))
        >>> y, state = mixer(torch.randn(2, 1, 64), lower_bound=torch.full((64,), 0.5), state=state)
        >>> y.shape, state["recurrent"].shape
        (torch.Size([2, 1, 64]), torch.Size([2, 4, 16, 16]))
    """

    def __init__(
        self,
        hidden_size: int,
        expand_ratio: int | None = None,
        *,
        num_heads: int | None = None,
        q_activation: str = "silu",
        v_activation: str = "none",
        scale: float | None = None,
        norm: str = "rmsnorm",
        norm_eps: float = 1e-5,
        norm_affine: bool = True,
        bias: bool = False,
        conv_size: int = 0,
        min_log_decay: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        check_fixed_settings(min_log_decay, q_activation, v_activation)
        check_backend(backend)
        expand_ratio = _head_width(hidden_size, expand_ratio, num_heads)
        _check_whole("conv_size", conv_size, 0, "the taps of a convolution, or 0 for none")
        # not a number fails the comparison
        if scale is not None and not (isinstance(scale, int | float) and abs(scale) < float("inf")):
            raise ValueError(f"scale is {describe(scale)}; wanted a finite number, or None for expand_ratio^-0.5")
        self.expand_ratio = expand_ratio
        self.num_heads = hidden_size // expand_ratio
        self.scale = expand_ratio**-0.5 if scale is None else scale
        self.q_activation, self.v_activation = q_activation, v_activation
        self.min_log_decay, self.backend = min_log_decay, backend
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.f_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.i_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        if conv_size:
            self.q_conv1d = ShortConv(hidden_size, conv_size)
            self.f_conv1d = ShortConv(hidden_size, conv_size)
            self.i_conv1d = ShortConv(hidden_size, conv_size)
        self.conv_size = conv_size
        self.g_norm = Norm(norm, hidden_size, norm_eps, norm_affine)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        lower_bound: Tensor | None = None,
        state: MixerState | None = None,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, MixerState]:
        """Mixes tokens; one token of a batch takes the step form.

        Args:
            x: [B, T, D], in the dtype of the weights unless autocast is on.
            lower_bound: [D], or [H, K] as the scan takes it; float32 in [0, 1). Channel d of [D] is channel d % K of
                head d // K. None means 0.
            state: of the tokens before x, as an earlier call or `init_state` gave it; None at a start.
            cu_seqlens: [N + 1] int32 or int64, bounds of packed sequences (B = 1), or None.
            mask: [B, T], False or 0 where a token is padding and must leave the state alone, or None.
            keep_state: whether the new state is wanted.

        Returns:
            y [B, T, D] and the new state, {} if it is not wanted.

        Raises:
            ValueError: an argument that does not fit x or the layer.
        """
        bound = self._check(x, lower_bound, state, cu_seqlens, mask)
        q, z, v, new_state = self.project(x, state, cu_seqlens, mask)
        recurrent = None if state is None else state["recurrent"]
        min_log_decay = self.min_log_decay if self.training else None
        # a length that an exported program leaves open is no step
        is_step = isinstance(x.shape[1], int) and x.shape[1] == 1
        if recurrent is not None and is_step and cu_seqlens is None and min_log_decay is None:
            y, recurrent = hgrn2_step(
                q[:, 0],
                z[:, 0],
                v[:, 0],
                recurrent,
                bound,
                scale=self.scale,
                backend=self.backend,
                q_activation=self.q_activation,
                v_activation=self.v_activation,
            )
            y = y.unsqueeze(1)
        else:
            y, recurrent = hgrn2_scan(
                q, z, v, bound, initial_state=recurrent, cu_seqlens=cu_seqlens, scale=self.scale, backend=self.backend,
                q_activation=self.q_activation, v_activation=self.v_activation, min_log_decay=min_log_decay,
            )  # fmt: skip
        new_state["recurrent"] = recurrent
        return self.o_proj(self.g_norm(y.flatten(2))), new_state if keep_state else {}

    def project(
        self, x: Tensor, state: MixerState | None, cu_seqlens: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, MixerState]:
        """Computes the scan's pre-activations, each [B, T, H, K], and the state of the short convolutions."""
        mask = None if mask is None else mask.bool()
        projected = {"q": self.q_proj(x), "f": self.f_proj(x), "i": self.i_proj(x)}
        new_state: MixerState = {}
        if self.conv_size:
            for name, conv in (("q", self.q_conv1d), ("f", self.f_conv1d), ("i", self.i_conv1d)):
                before = None if state is None else state[f"{name}_conv"]
                inputs = projected[name] if mask is None else projected[name] * mask.unsqueeze(-1)
                projected[name], new_state[f"{name}_conv"] = conv(inputs, before, cu_seqlens, mask)
        if mask is not None:
            projected["f"] = projected["f"].masked_fill(~mask.unsqueeze(-1), _KEEP_STATE)
        q, z, v = (p.unflatten(-1, (self.num_heads, self.expand_ratio)) for p in projected.values())
        return q, z, v, new_state

    def init_state(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """Makes the state before the first token.

        Args:
            batch_size: number of sequences.
            device: where; None for that of the weights.
            dtype: of the layer's inputs; None for that of the weights. The recurrent state is float32 in any case
                (float64 for float64 inputs).
        """
        weight = self.g_norm.weight if self.g_norm.weight is not None else self.q_proj.weight
        device = weight.device if device is None else device
        dtype = weight.dtype if dtype is None else dtype
        head = self.expand_ratio
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        state = {"recurrent": torch.zeros((batch_size, self.num_heads, head, head), device=device, dtype=wide)}
        if self.conv_size:
            shape = (batch_size, self.conv_size - 1, self.num_heads * head)
            state |= {f"{name}_conv": torch.zeros(shape, device=device, dtype=dtype) for name in "qfi"}
        return state

    def extra_repr(self) -> str:
        """Settings that print(model) shows."""
        return f"{self.num_heads} heads of {self.expand_ratio} x {self.expand_ratio}"

    def _check(
        self,
        x: Tensor,
        lower_bound: Tensor | None,
        state: MixerState | None,
        cu_seqlens: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor | None:
        """Checks the arguments of `forward` by the names they have there; returns the bound as [H, K]."""
        width = self.num_heads * self.expand_ratio
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != width:
            raise ValueError(f"x is {describe(x)}; wanted a tensor [B, T, D] with D={width}")
        self._check_against_weights(x)
        if mask is not None:
            if cu_seqlens is not None:
                raise ValueError("mask and cu_seqlens were both given; packed sequences have no padding, drop the mask")
            if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
                raise ValueError(f"mask is {describe(mask)}; wanted a tensor {list(x.shape[:2])}, 0 where x is padding")
            check_device("mask", mask, "x", x)
        sequences = x.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens, x, False, "x")
            sequences = cu_seqlens.shape[0] - 1
        if state is not None:
            self._check_state(state, x, sequences)
        if lower_bound is None:
            return None
        heads = (self.num_heads, self.expand_ratio)
        if not isinstance(lower_bound, Tensor) or lower_bound.shape not in ((width,), heads):
            raise ValueError(
                f"lower_bound is {describe(lower_bound)}; wanted a tensor [D] = [{width}], or [H, K] = {list(heads)}"
            )
        check_bound_like("lower_bound", lower_bound, x, "x")
        return lower_bound.reshape(heads)

    def _check_against_weights(self, x: Tensor) -> None:
        linear = self.q_proj
        # adapters, quantized weights and weights that a hook brings are for their own modules to judge
        if torch.compiler.is_compiling() or type(linear) is not nn.Linear or hasattr(linear, "_hf_hook"):
            return
        weight = linear.weight
        check_device("x", x, "the layer", weight)
        if x.dtype != weight.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"x has dtype {x.dtype}; the layer's weights have {weight.dtype}, convert one of them")

    def _check_state(self, state: MixerState, x: Tensor, sequences: int) -> None:
        names = {"recurrent"} | ({f"{name}_conv" for name in "qfi"} if self.conv_size else set())
        if not isinstance(state, dict) or not names <= state.keys():
            found = sorted(state) if isinstance(state, dict) else describe(state)
            raise ValueError(
                f"state is {found}; wanted a table with {', '.join(sorted(names))}, as init_state gives it"
            )
        head = self.expand_ratio
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(sorted(names), (sequences, self.conv_size - 1, x.shape[-1]))
        shapes["recurrent"] = (sequences, self.num_heads, head, head)
        for name, shape in shapes.items():
            if not isinstance(state[name], Tensor) or state[name].shape != shape:
                raise ValueError(f"state: {name} is {describe(state[name])}; wanted a tensor {list(shape)}")
            check_device(f"state: {name}", state[name], "x", x)
        check_bound_like("state: recurrent", state["recurrent"], x, "x")


def _check_whole(name: str, value: int, least: int, wanted: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {describe(value)}; wanted {wanted}")


def _head_width(hidden_size: int, expand_ratio: int | None, num_heads: int | None) -> int:
    """The width of a head, from what was given of it."""
    _check_whole("hidden_size", hidden_size, 1, "a whole number of at least 1")
    if num_heads is not None:
        _check_whole("num_heads", num_heads, 1, "a whole number of at least 1")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size is {hidden_size} and num_heads {num_heads}; wanted a multiple of it")
        if expand_ratio is None:
            return hidden_size // num_heads
    if expand_ratio is None:
        if hidden_size % DEFAULT_EXPAND_RATIO:
            raise ValueError(
                f"hidden_size is {hidden_size}; wanted a multiple of {DEFAULT_EXPAND_RATIO}, or expand_ratio or "
                "num_heads beside it"
            )
        return DEFAULT_EXPAND_RATIO
    _check_whole("expand_ratio", expand_ratio, 1, "a whole number of at least 1")
    if hidden_size % expand_ratio:
        raise ValueError(f"hidden_size is {hidden_size} and expand_ratio {expand_ratio}; wanted a multiple of it")
    if num_heads not in (None, hidden_size // expand_ratio):
        raise ValueError(
            f"num_heads is {num_heads}, and hidden_size / expand_ratio is {hidden_size // expand_ratio}; give one of "
            "the two"
        )
    return expand_ratio


def forget_gate(z: Tensor, lower_bound: Tensor | None) -> Tensor:
    """Computes beta + (1 - beta) sigmoid(z), the part of each state channel that a token keeps, in float32 or wider."""
    gate = torch.sigmoid(z.to(torch.promote_types(z.dtype, torch.float32)))
    return gate if lower_bound is None else lower_bound + (1 - lower_bound) * gate
