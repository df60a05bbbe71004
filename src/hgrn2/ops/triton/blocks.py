"""Block sizes of the kernels: data, so that nothing is tuned while a program runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Block:
    """Of one kernel: blocks along K and V, warps of a program, depth of its pipeline."""

    k: int
    v: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Blocks:
    """Of all kernels of a call.

    Attributes:
        chunk: tokens of a chunk.
        precision: of float32 products, as `tl.dot` names it.
        update: of `chunk_update_kernel`.
        output: of `chunk_output_kernel`.
        gradient: of `chunk_gradient_kernel`.
    """

    chunk: int
    precision: str
    update: Block
    output: Block
    gradient: Block


def blocks_for(device: torch.device, dtype: torch.dtype, length: int, k_width: int, v_width: int) -> Blocks:
    """The sizes for a chip and shape.

    Args:
        device: where the kernels run.
        dtype: of the inputs.
        length: T.
        k_width: K.
        v_width: V.
    """
    chunk = max(16, min(64, 1 << max(length - 1, 0).bit_length()))
    low = dtype != torch.float32
    precision = "tf32" if low else "tf32x3"

    def block(k: int, v: int, warps: int, stages: int = 2) -> Block:
        return Block(min(_width(k_width), k), min(_width(v_width), v), warps, stages)

    if low:
        return Blocks(chunk, precision, block(64, 128, 4), block(64, 128, 8), block(64, 64, 8))
    return Blocks(chunk, precision, block(32, 64, 4, 1), block(32, 64, 8, 1), block(32, 32, 8, 1))


def step_block(states: int, v_width: int) -> int:
    """Columns of V a program of `step_kernel` takes: few when there are few states, so that all the chip works."""
    return min(_width(v_width), 16 if states <= 64 else 64)


def _width(width: int) -> int:
    """The power of two that holds a width; matrix units take no less than 16."""
    return max(16, 1 << (width - 1).bit_length())
