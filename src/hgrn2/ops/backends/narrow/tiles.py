"""How the kernels divide a call: tokens, heads and lanes of a program, and segments of a sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hgrn2.ops.call import ScanCall

# channels of a head, of gates or of values
WIDEST = 16
LANES = 32
# programs below which sequences are cut, and the number that the parts then make, for each multiprocessor
FEWEST_PROGRAMS, CUT_PROGRAMS = 6, 12
# a multiple of the tokens of every tile
SEGMENT_STEP = 64


class Tile(NamedTuple):
    """Block of a kernel.

    Attributes:
        tokens: tokens of a block, a power of two up to `SEGMENT_STEP`.
        states: state numbers of a lane, a power of two; they set the heads of a program.
    """

    tokens: int
    states: int


# by the larger of K and V, rounded up to a power of two: few instructions a token and no spills to memory, as Triton
# 3.6 compiles for compute capability 9.0. Not measured yet; `benchmarks/tune_narrow.py` times them and others
FORWARD = {1: Tile(16, 1), 2: Tile(16, 2), 4: Tile(8, 4), 8: Tile(8, 4), 16: Tile(4, 8)}
BACKWARD = {1: Tile(8, 1), 2: Tile(8, 2), 4: Tile(8, 2), 8: Tile(8, 4), 16: Tile(4, 8)}


class Blocks(NamedTuple):
    """Sizes for a kernel: tokens, heads, K and V of a program, each a power of two."""

    tokens: int
    heads: int
    k: int
    v: int


def power_of_two(width: int) -> int:
    """Return the next power of two of a width from 1 to `WIDEST`."""
    size = 1
    # not bit_length: a traced program may leave the width open
    while size < width:
        size *= 2
    return size


def blocks_for(table: dict[int, Tile], k_width: int, v_width: int) -> Blocks:
    """Return the sizes for a shape: heads fill a warp with the wanted number of states in a lane.

    Args:
        table: `FORWARD` or `BACKWARD`.
        k_width: K.
        v_width: V.
    """
    k, v = power_of_two(k_width), power_of_two(v_width)
    tile = table[max(k, v)]
    return Blocks(tile.tokens, max(1, LANES * tile.states // (k * v)), k, v)


def segment_size(batch: int, length: int, head_blocks: int, packed: bool, multiprocessors: int) -> int:
    """Return the tokens of a segment, from shapes alone: T where there are programs enough.

    Args:
        batch: B.
        length: T.
        head_blocks: programs side by side for the heads.
        packed: whether sequences are packed, whose lengths only the device knows.
        multiprocessors: those of the device.
    """
    programs = max(1, batch * head_blocks)
    if not packed and programs >= FEWEST_PROGRAMS * multiprocessors:
        return max(length, 1)
    parts = max(1, -(-CUT_PROGRAMS * multiprocessors // programs))
    return max(SEGMENT_STEP, -(-length // (parts * SEGMENT_STEP)) * SEGMENT_STEP)


def kept_shape(call: ScanCall, tokens: int) -> tuple[int, ...]:
    """Return the shape of the states before every `tokens` tokens of each sequence; (0,) for 0.

    Args:
        call: the call; its tensors may be fake.
        tokens: tokens between kept states.
    """
    if not tokens:
        return (0,)
    batch, length, heads, k_width = call.q.shape
    # a packed sequence begins at place floor(start / tokens) + n, which needs no sum over lengths
    blocks = batch * -(-length // tokens) if call.cu_seqlens is None else length // tokens + call.num_packed()
    return (blocks, call.v.shape[-1], heads, k_width)


def takes(dtype: torch.dtype, k_width: int, v_width: int, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return why the kernels cannot take a dtype and widths, or None."""
    if dtype not in dtypes:
        return f"its kernels do not take {dtype}"
    if not (1 <= k_width <= WIDEST and 1 <= v_width <= WIDEST):
        return f"K is {k_width} and V {v_width}, and its kernels take 1 to {WIDEST}"
    return None
