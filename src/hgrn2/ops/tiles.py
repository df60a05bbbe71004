"""How the rows of a batch are cut into chunks, and chunks into tiles that fit a cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_SIZE = 64
# a tile's elements: on a CPU small enough for the caches of a few cores, large enough to hide the cost of a dispatch;
# elsewhere as much as keeps temporaries modest
TILE_ELEMENTS_CPU = 262_144
TILE_ELEMENTS_ACCELERATOR = 67_108_864
MAX_CHUNKS_PER_TILE_CPU = 16


@dataclass(frozen=True)
class Cut:
    """Sizes that follow from shapes alone (known while tracing, before any data is seen).

    Attributes:
        chunk_size: tokens of a chunk, a power of two.
        chunks_per_tile: chunks that are worked on together.
        batch_per_tile: sequences of the batch that are worked on together.
        max_tiles: upper bound of the number of tiles along time.
    """

    chunk_size: int
    chunks_per_tile: int
    batch_per_tile: int
    max_tiles: int


def cut(batch: int, length: int, heads: int, width: int, num_sequences: int | None, device: torch.device) -> Cut:
    """Chooses chunk and tile sizes.

    Args:
        batch: B.
        length: T.
        heads: H.
        width: the larger of K and V.
        num_sequences: number of packed sequences, or None when the batch is not packed.
        device: where the work happens.
    """
    chunk_size = min(CHUNK_SIZE, 1 << max(length - 1, 0).bit_length())
    # every packed sequence can end in a chunk that is not full
    num_chunks = -(-length // chunk_size) + (num_sequences or 0)
    per_chunk = max(1, heads * chunk_size * width)
    if device.type == "cpu":
        elements, most = TILE_ELEMENTS_CPU, MAX_CHUNKS_PER_TILE_CPU
    else:
        elements, most = TILE_ELEMENTS_ACCELERATOR, num_chunks
    chunks_per_tile = max(1, min(most, num_chunks, elements // per_chunk))
    batch_per_tile = max(1, min(batch, elements // (per_chunk * chunks_per_tile)))
    return Cut(chunk_size, chunks_per_tile, batch_per_tile, -(-num_chunks // chunks_per_tile))


@dataclass(frozen=True)
class Tile:
    """A run of chunks in the order of memory.

    Attributes:
        start: first source row.
        stop: one past the last source row.
        num_chunks: chunks in the tile.
        places: for each source row its place in the tile (chunk * chunk_size + offset), int64; None when the rows fill
            the tile without gaps.
        padding: [num_chunks, chunk_size, 1] bool, True where no row is; None when there is no gap.
        sequences: for each chunk the sequence it belongs to.
        begins: for each chunk whether it holds its sequence's first row.
        ends: for each chunk whether it holds its sequence's last row.
    """

    start: int
    stop: int
    num_chunks: int
    places: Tensor | None
    padding: Tensor | None
    sequences: tuple[int, ...]
    begins: tuple[bool, ...]
    ends: tuple[bool, ...]


def tiles(boundaries: Sequence[int], sizes: Cut, device: torch.device) -> list[Tile]:
    """The tiles of sequences that lie end to end.

    Args:
        boundaries: first row of each sequence and, last, the total length (non-decreasing, starts with 0).
        sizes: result of `cut`.
        device: where the row indices are wanted.
    """
    size = sizes.chunk_size
    chunks = [
        (row, min(row + size, stop), sequence)
        for sequence, (start, stop) in enumerate(itertools.pairwise(boundaries))
        for row in range(start, stop, size)
    ]
    result = []
    for at in range(0, len(chunks), sizes.chunks_per_tile):
        part = chunks[at : at + sizes.chunks_per_tile]
        places = padding = None
        if any(stop - start < size for start, stop, _ in part):
            counts = torch.tensor([stop - start for start, stop, _ in part])
            padding = torch.arange(size)[None, :] >= counts[:, None]
            places = (~padding).flatten().nonzero().squeeze(1).to(device)
            padding = padding.unsqueeze(-1).to(device)
        result.append(
            Tile(
                start=part[0][0],
                stop=part[-1][1],
                num_chunks=len(part),
                places=places,
                padding=padding,
                sequences=tuple(sequence for _, _, sequence in part),
                begins=tuple(start == boundaries[sequence] for start, _, sequence in part),
                ends=tuple(stop == boundaries[sequence + 1] for _, stop, sequence in part),
            )
        )
    return result


def load(x: Tensor, tile: Tile, chunk_size: int, dtype: torch.dtype) -> Tensor:
    """Copies a tile's rows of x [B, T, H, W] into a new [B, H, chunks, chunk_size, W] tensor; gaps hold zeros."""
    batch, _, heads, width = x.shape
    rows = x[:, tile.start : tile.stop]
    if tile.places is None:
        out = torch.empty((batch, heads, tile.num_chunks, chunk_size, width), dtype=dtype, device=x.device)
        by_rows = out.view(batch, heads, tile.num_chunks * chunk_size, width).transpose(1, 2)
        by_rows.copy_(rows)
        return out
    out = torch.zeros((batch, heads, tile.num_chunks, chunk_size, width), dtype=dtype, device=x.device)
    by_rows = out.view(batch, heads, tile.num_chunks * chunk_size, width)
    by_rows.index_copy_(2, tile.places, rows.transpose(1, 2).to(dtype))
    return out


def store(out: Tensor, x: Tensor, tile: Tile) -> None:
    """Copies a tile [B, H, chunks, chunk_size, W] to its rows of out [B, T, H, W]; gaps are left out."""
    batch, heads, num_chunks, chunk_size, width = x.shape
    by_rows = x.view(batch, heads, num_chunks * chunk_size, width)
    if tile.places is not None:
        by_rows = by_rows.index_select(2, tile.places)
    out[:, tile.start : tile.stop].copy_(by_rows.transpose(1, 2))
