"""Divide the rows of a batch into chunks, and chunks into tiles that fit a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.ops.transforms import is_batched

CHUNK_SIZE = 64
# bytes of one input in a tile: on a CPU small enough for the caches of a few cores and large enough to hide the cost of
# dispatch; elsewhere limited by the memory of temporaries
TILE_BYTES_CPU = 1 << 20
TILE_BYTES_ACCELERATOR = 1 << 27
MAX_CHUNKS_PER_TILE_CPU = 16
MAX_CHUNKS_PER_TILE_ACCELERATOR = 4096


def chunks_per_tile(heads: int, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the number of chunks in a tile.

    It does not depend on the length, which a traced program may leave open. A traced program holds the number, so that
    it stays valid when a later version cuts other tiles.

    Args:
        heads: H.
        width: the larger of K and V.
        dtype: dtype of the inputs.
        device: device of the inputs.
    """
    most = MAX_CHUNKS_PER_TILE_CPU if device.type == "cpu" else MAX_CHUNKS_PER_TILE_ACCELERATOR
    return max(1, min(most, _tile_elements(dtype, device) // (heads * CHUNK_SIZE * width)))


def _tile_elements(dtype: torch.dtype, device: torch.device) -> int:
    return (TILE_BYTES_CPU if device.type == "cpu" else TILE_BYTES_ACCELERATOR) // dtype.itemsize


def max_tiles(length: int, num_packed: int, chunks: int) -> int:
    """Return an upper bound of the number of tiles along time.

    Args:
        length: T.
        num_packed: packed sequences, each of which can end in a partial chunk; 0 when nothing is packed.
        chunks: chunks of a tile.
    """
    return -(-(-(-length // CHUNK_SIZE) + num_packed) // chunks)


def batch_per_tile(
    batch: int, length: int, heads: int, width: int, tile_chunks: int, dtype: torch.dtype, device: torch.device
) -> int:
    """Return the number of sequences of a batch in a tile.

    Args:
        batch: number of sequences.
        length: T.
        heads: H.
        width: the larger of K and V.
        tile_chunks: number of chunks in a tile.
        dtype: dtype of the inputs.
        device: device of the inputs.
    """
    rows = min(length, tile_chunks * CHUNK_SIZE)
    return max(1, min(batch, _tile_elements(dtype, device) // max(1, rows * heads * width)))


def chunk_size(length: int) -> int:
    """Return the tokens of a chunk: a power of two, no larger than a short sequence needs."""
    return min(CHUNK_SIZE, 1 << max(length - 1, 0).bit_length())


def boundaries(cu_seqlens: Tensor | None, length: int) -> list[int]:
    """Return the first row of each sequence and, last, the length.

    Args:
        cu_seqlens: [N + 1], or None for one sequence.
        length: T.

    Raises:
        UserError: cu_seqlens does not start at 0, end at T, or falls; or vmap runs over it.
    """
    if cu_seqlens is None:
        return [0, length]
    if is_batched(cu_seqlens):
        raise UserError(
            "cu_seqlens is mapped over by vmap, but its values decide shapes here; use a loop, or in an operator "
            "another backend than 'reference'",
            "unsupported",
        )
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        shown = f"{bounds[:4]} ... {bounds[-2:]}" if len(bounds) > 8 else f"{bounds}"
        raise UserError(f"cu_seqlens is {shown}; wanted 0, then non-decreasing starts, then T = {length}")
    return bounds


@dataclass(frozen=True)
class Tile:
    """A run of chunks in the order of memory.

    Attributes:
        start: first source row.
        stop: one past the last source row.
        num_chunks: chunks in the tile.
        places: index in the tile of each source row (chunk * chunk_size + offset), int64; None when the rows fill the
            tile without gaps.
        padding: [num_chunks, 1, 1, chunk_size, 1] bool, True in gaps; None when there are none.
        sequences: the sequence of each chunk.
        begins: whether each chunk holds its sequence's first row.
        ends: whether each chunk holds its sequence's last row.
    """

    start: int
    stop: int
    num_chunks: int
    places: Tensor | None
    padding: Tensor | None
    sequences: tuple[int, ...]
    begins: tuple[bool, ...]
    ends: tuple[bool, ...]


def tiles(bounds: Sequence[int], size: int, chunks_each: int, device: torch.device) -> list[Tile]:
    """Return the tiles of sequences packed end to end.

    Args:
        bounds: first row of each sequence and, last, the total length.
        size: tokens of a chunk.
        chunks_each: chunks of a tile.
        device: device for the row indices.
    """
    chunks = [
        (row, min(row + size, stop), sequence)
        for sequence, (start, stop) in enumerate(pairwise(bounds))
        for row in range(start, stop, size)
    ]
    result = []
    for at in range(0, len(chunks), chunks_each):
        part = chunks[at : at + chunks_each]
        places = padding = None
        if any(stop - start < size for start, stop, _ in part):
            counts = torch.tensor([stop - start for start, stop, _ in part])
            padding = torch.arange(size)[None, :] >= counts[:, None]
            places = (~padding).flatten().nonzero().squeeze(1).to(device)
            padding = padding[:, None, None, :, None].to(device)
        result.append(
            Tile(
                start=part[0][0],
                stop=part[-1][1],
                num_chunks=len(part),
                places=places,
                padding=padding,
                sequences=tuple(sequence for _, _, sequence in part),
                begins=tuple(start == bounds[sequence] for start, _, sequence in part),
                ends=tuple(stop == bounds[sequence + 1] for _, stop, sequence in part),
            )
        )
    return result


def load(x: Tensor, tile: Tile, out: Tensor) -> Tensor:
    """Return a tile's rows of x [B, T, H, W] as [chunks, B, H, C, W] in out's dtype; gaps hold zeros.

    The result is a view of x if x has that dtype, otherwise out.
    """
    num_chunks, batch, heads, chunk_size, width = out.shape
    rows = x[:, tile.start : tile.stop]
    if tile.places is not None:
        filled = x.new_zeros((batch, num_chunks * chunk_size, heads, width))
        rows = filled.index_copy_(1, tile.places, rows)
    rows = rows.unflatten(1, (num_chunks, chunk_size)).permute(1, 0, 3, 2, 4)
    return rows if x.dtype == out.dtype else out.copy_(rows)


def store(out: Tensor, x: Tensor, tile: Tile) -> None:
    """Copy a tile [chunks, B, H, chunk_size, W] without its gaps to its rows of out [B, T, H, W]."""
    rows, by_chunk = out[:, tile.start : tile.stop], x.permute(1, 0, 3, 2, 4)
    if tile.places is None:
        rows.unflatten(1, by_chunk.shape[1:3]).copy_(by_chunk)
    else:
        rows.copy_(by_chunk.flatten(1, 2).index_select(1, tile.places))
