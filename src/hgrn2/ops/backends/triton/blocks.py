"""Block sizes of the kernels, from a table: nothing is tuned while a program runs.

`benchmarks/tune.py` measures `blocks.json`, keyed by chip, then by dtype and widths. Other chips and shapes get the
sizes below.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("blocks.json")


@dataclass(frozen=True)
class Block:
    """Sizes for one kernel: blocks along K and V, warps of a program, stages of its pipeline."""

    k: int
    v: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Blocks:
    """Sizes for all kernels of a call.

    Attributes:
        chunk: tokens of a chunk.
        update: sizes for `chunk_update_kernel`.
        output: sizes for `chunk_output_kernel`.
        gradient: sizes for `chunk_gradient_kernel`.
    """

    chunk: int
    update: Block
    output: Block
    gradient: Block


# the fastest on an H100 at K = V = 128
LOW = Blocks(32, Block(64, 128, 4, 1), Block(128, 128, 4, 1), Block(64, 64, 4, 1))
FLOAT32 = Blocks(32, Block(128, 128, 4, 1), Block(32, 128, 4, 1), Block(64, 32, 4, 1))


def blocks_for(device: torch.device, dtype: torch.dtype, length: int, k_width: int, v_width: int) -> Blocks:
    """Return the sizes for a chip and shape.

    Args:
        device: device of the inputs.
        dtype: dtype of the inputs.
        length: T; no chunk is longer than a short sequence needs.
        k_width: K; no block is wider.
        v_width: V.
    """
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = _measured(chip, key(dtype, k_width, v_width)) or (FLOAT32 if dtype == torch.float32 else LOW)
    chunk = max(16, min(found.chunk, 1 << max(length - 1, 0).bit_length()))
    fitted = (fit(block, k_width, v_width) for block in (found.update, found.output, found.gradient))
    return Blocks(chunk, *fitted)


def key(dtype: torch.dtype, k_width: int, v_width: int) -> str:
    """Return the key of a dtype and widths in the table; both 16-bit dtypes share one."""
    return f"{'float32' if dtype == torch.float32 else '16-bit'} K{_width(k_width)} V{_width(v_width)}"


def fit(block: Block, k_width: int, v_width: int) -> Block:
    """Return a block no wider than K and V."""
    return Block(min(block.k, _width(k_width)), min(block.v, _width(v_width)), block.warps, block.stages)


@functools.cache
def _measured(chip: str, shape: str) -> Blocks | None:
    found = json.loads(TABLE.read_text(encoding="utf-8")).get(chip, {}).get(shape)
    if found is None:
        return None
    return Blocks(found["chunk"], *(Block(**found[name]) for name in ("update", "output", "gradient")))


def step_block(states: int, v_width: int) -> int:
    """Return the columns of V for a program of `step_kernel`: few for few states, so that all multiprocessors work."""
    return min(_width(v_width), 16 if states <= 64 else 64)


def _width(width: int) -> int:
    """Return the next power of two of a width, at least 16, which matrix units need."""
    return max(16, 1 << (width - 1).bit_length())
