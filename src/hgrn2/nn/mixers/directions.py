"""Directions in which a mixer reads tokens: causal, reverse, both, and over the rows and columns of an image.

A direction runs the three parts of a `DirectedMixer`: `project` once, `mix` once or several times, with the outputs
added, and `finish` once. With several scans, a token's own write counts once per scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.nn.mixers.context import Context, MixerState, Order
from hgrn2.nn.short_conv import ShortConv
from hgrn2.ops.pieces import rows_before
from hgrn2.shapes import BTD, describe

if TYPE_CHECKING:
    from hgrn2.nn.mixers.base import DirectedMixer

DIRECTIONS = ("causal", "reverse", "bidirectional", "columns", "columns-reverse", "2d", "2d-series")
# scans of each direction
NUM_SCANS = dict.fromkeys(DIRECTIONS, 1) | {"bidirectional": 2, "2d": 4, "2d-series": 4}
# order of the scans of each direction
ORDERS: dict[str, Order] = {
    "causal": "causal", "columns": "causal", "reverse": "reverse", "columns-reverse": "reverse",
    "bidirectional": "bidirectional", "2d": "bidirectional", "2d-series": "bidirectional",
}  # fmt: skip
# directions that need a grid
GRID_DIRECTIONS = ("columns", "columns-reverse", "2d", "2d-series")
# names of patterns: one scan per layer, in an order that changes with the layer
PATTERNS = {
    "alternating": ("causal", "reverse"),
    "alternating-2d": ("causal", "reverse", "columns", "columns-reverse"),
}


def check_direction(direction: Any, what: str = "direction", known: Sequence[str] = DIRECTIONS) -> None:
    """Raise a UserError unless a direction exists.

    Args:
        direction: the name.
        what: name of the setting, for messages.
        known: names that are valid.
    """
    if not isinstance(direction, str):
        raise UserError(f"{what} is {describe(direction)}; wanted one of {', '.join(known)}")
    if direction not in known:
        raise UserError(unknown_key_message(what, direction, known, "direction"), "unknown-name")


def read_directions(value: Any, num_layers: int) -> tuple[str, ...]:
    """Return the direction of each layer.

    Args:
        value: a name of `DIRECTIONS`; or several, as a list or as text separated by commas, repeated over the layers;
            or "alternating" (causal, reverse) or "alternating-2d" (causal, reverse, columns, columns-reverse).
        num_layers: number of layers.

    Raises:
        UserError: a direction does not exist (the message suggests similar names), or there are more directions than
            layers.

    Example:
        >>> read_directions("alternating", 4)
        ('causal', 'reverse', 'causal', 'reverse')
    """
    if isinstance(value, str):
        value = PATTERNS.get(value) or [name.strip() for name in value.split(",")]
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"directions is {describe(value)}; wanted one or more of {', '.join((*DIRECTIONS, *PATTERNS))}")
    for name in value:
        check_direction(name, "directions", DIRECTIONS if len(value) > 1 else (*DIRECTIONS, *PATTERNS))
    if len(value) > num_layers:
        raise UserError(
            f"directions has {len(value)} names, and the model {num_layers} layers; wanted at most one per layer",
            "contradiction",
        )
    return tuple(value[i % len(value)] for i in range(num_layers))


def run_direction(mixer: DirectedMixer, x: BTD, context: Context) -> BTD:
    """Mix tokens in the mixer's direction, which is not "causal".

    Args:
        mixer: the mixer.
        x: [B, T, D].
        context: further inputs of the pass.

    Raises:
        UserError: the direction needs a grid and has none, or the grid does not fit x.
    """
    direction = mixer.direction
    if mixer.sees_all and direction in ("2d", "2d-series"):
        direction = "bidirectional"
    if direction in GRID_DIRECTIONS:
        rows, columns = _check_grid(x, context, direction)
        if direction == "2d":
            return _run(mixer, x, context.for_order("bidirectional", "both"))
        if direction == "2d-series":
            x = _run(mixer, x, context.for_order("bidirectional", "columns"))
            return _run(mixer, x, context.for_order("bidirectional", "rows"))
        mask = None if context.mask is None else _transpose(context.mask, rows, columns)
        by_column = Context(None, mask, False, False, context.lower_bound, context.earlier, None, ORDERS[direction])
        return _transpose(_run(mixer, _transpose(x, rows, columns), by_column), columns, rows)
    return _run(mixer, x, context.for_order(ORDERS[direction]))


def _run(mixer: DirectedMixer, x: BTD, context: Context) -> BTD:
    """Run `project`, then one or two scans along each axis, then `finish`."""
    inputs, others, _ = mixer.project(x, None, context)
    total = None
    for axis in ("rows", "columns") if context.axis == "both" else (context.axis,):
        y = _mix_along(mixer, inputs, context, axis)
        total = y if total is None else total + y
    assert total is not None
    return mixer.finish(total, others)


def _mix_along(mixer: DirectedMixer, inputs: tuple[Tensor, ...], context: Context, axis: str | None) -> Tensor:
    """Mix along one axis; the result is laid out like the inputs, [B, T, ...]."""
    if axis is None:
        return mixer.mix_in_order(inputs, context)
    assert context.grid is not None
    rows, columns = context.grid
    batch, mask, bound = inputs[0].shape[0], context.mask, context.lower_bound
    if axis == "rows":
        mask = None if mask is None else mask.reshape(batch * rows, columns)
        cut = tuple(part.reshape(batch * rows, columns, *part.shape[2:]) for part in inputs)
        y = mixer.mix_in_order(cut, context.for_sequences(mask, bound))
        return y.reshape(batch, rows * columns, *y.shape[2:])
    if mixer.folds_columns:
        # the columns become further channels of sequences as long as the grid is high: views, no copies
        cut = tuple(part.unflatten(1, (rows, columns)).flatten(2, 3) for part in inputs)
        bound = None if bound is None else bound.flatten().repeat(columns)
        y = mixer.mix_in_order(cut, context.for_sequences(None, bound))
        return y.unflatten(2, (columns, inputs[0].shape[2])).flatten(1, 2)
    cut = tuple(_split_columns(part, rows, columns) for part in inputs)
    mask = None if mask is None else _split_columns(mask, rows, columns)
    y = mixer.mix_in_order(cut, context.for_sequences(mask, bound))
    return y.unflatten(0, (batch, columns)).transpose(1, 2).flatten(1, 2)


def convolve(conv: ShortConv, x: BTD, state: Tensor | None, context: Context) -> tuple[BTD, Tensor]:
    """Run a short convolution in the order and along the axis of a context.

    It looks back in the causal order, ahead in the reverse order, and is centred otherwise. Over a grid it runs within
    rows, within columns, or within both, one after the other with the same taps.

    Args:
        conv: the convolution.
        x: [B, T, D]; zero at padding.
        state: [N, taps - 1, D], the last inputs before x, in the causal order only; None for zeros.
        context: further inputs of the pass.

    Returns:
        The result, shaped like x, and the new state, which is meaningful in the causal order only.
    """
    mask = context.mask
    if context.pieces is not None and state is None and conv.width > 1:
        state = rows_before(x, conv.width - 1, context.cu_seqlens, context.pieces)
    if context.axis is None:
        return conv(x, state, context.cu_seqlens, mask, context.order)
    assert context.grid is not None
    rows, columns = context.grid
    batch = x.shape[0]
    last = x
    if context.axis != "columns":
        within = None if mask is None else mask.reshape(batch * rows, columns)
        y, last = conv(x.reshape(batch * rows, columns, x.shape[2]), None, None, within, context.order)
        x = y.reshape(x.shape)
    if context.axis != "rows":
        within = None if mask is None else _split_columns(mask, rows, columns)
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        y, last = conv(_split_columns(x, rows, columns), None, None, within, context.order)
        x = y.unflatten(0, (batch, columns)).transpose(1, 2).flatten(1, 2)
    return x, last


def refuse_state(direction: str, state: MixerState | None) -> None:
    """Raise a UserError if a state is given to a mixer of a direction other than "causal"."""
    if state is not None:
        raise UserError(
            f"direction is {direction!r}, which reads whole sequences and has no state to decode from; pass all "
            "tokens, with state=None",
            "unsupported",
        )


def _check_grid(x: BTD, context: Context, direction: str) -> tuple[int, int]:
    grid = context.grid
    if grid is None:
        raise UserError(
            f"direction is {direction!r} and there is no grid; give the rows and columns of x", "incomplete"
        )
    if context.cu_seqlens is not None:
        raise UserError(
            f"direction is {direction!r}, and cu_seqlens packs sequences; give images of one size, padded with a mask",
            "unsupported",
        )
    is_pair = isinstance(grid, list | tuple) and len(grid) == 2
    if not is_pair or not all(isinstance(size, int | torch.SymInt) and size >= 0 for size in grid):
        raise UserError(f"grid is {grid!r}; wanted (rows, columns) of the images")
    if grid[0] * grid[1] != x.shape[1]:
        raise UserError(f"grid is {tuple(grid)}, and x has {x.shape[1]} tokens; wanted rows * columns", "mismatch")
    return grid


def _transpose(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return x [B, rows * columns, ...] column by column."""
    return x.unflatten(1, (rows, columns)).transpose(1, 2).flatten(1, 2)


def _split_columns(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return the columns of x [B, rows * columns, ...] as sequences, [B * columns, rows, ...]; a copy."""
    return x.unflatten(1, (rows, columns)).transpose(1, 2).flatten(0, 1)
