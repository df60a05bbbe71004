"""Division of the work of the CUDA kernels, from shapes alone, so that a traced program can hold the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hgrn2.ops.call import ScanCall

WIDTH = 128  # K = V
CHUNK = 64  # tokens
# of an H100 or H200; on another chip the division is slower, not wrong
MULTIPROCESSORS = 132
# chunk states in memory at a time in the backward pass, 64 MiB, and as many gradients of them
MAX_STATES = 2048
# shorter segments would spend their time on starting
MIN_SEGMENT_CHUNKS = 8


def num_chunks(length: int, num_packed: int = 0) -> int:
    """Return the chunks of a sequence, or the most that packed sequences can have, a partial one each included.

    Args:
        length: tokens of the sequence, or of all packed sequences together.
        num_packed: number of packed sequences, 0 when nothing is packed.
    """
    return -(-length // CHUNK) + num_packed


def segment_chunks(rows: int, chunks: int) -> int:
    """Return the chunks of a segment, such that all segments together give each multiprocessor one program.

    Args:
        rows: sequences times heads that run together.
        chunks: chunks of a sequence.
    """
    segments = max(1, min(chunks, MULTIPROCESSORS // max(1, rows)))
    return max(1, -(-chunks // segments))


@dataclass(frozen=True)
class BackwardCut:
    """Division of the backward pass: groups of heads, each with parts of the sequence, from the last to the first.

    Attributes:
        heads: heads of a group; groups differ by one head at most.
        segments: segments of a part, which run in parallel.
        coarse: chunks of a segment, and between two states that the forward pass keeps.
    """

    heads: int
    segments: int
    coarse: int

    @property
    def part(self) -> int:
        """Return the chunks of a part."""
        return self.segments * self.coarse


def cut_backward(batch: int, chunks: int, heads: int) -> BackwardCut:
    """Return groups of heads and segments that give each multiprocessor one program.

    Segments are as long as MAX_STATES allows, but not shorter than MIN_SEGMENT_CHUNKS: beyond 256 sequences there are
    more than MAX_STATES at a time.

    Args:
        batch: number of sequences.
        chunks: chunks of a sequence.
        heads: H.
    """
    most = min(heads, max(1, MULTIPROCESSORS // max(1, batch)))
    group = -(-heads // -(-heads // most))
    rows = max(1, batch * group)
    segments = max(1, min(chunks, MULTIPROCESSORS // rows))
    most = max(MIN_SEGMENT_CHUNKS, MAX_STATES // (rows * segments))
    # parts of equal length: a short last one would keep few multiprocessors busy
    parts = max(1, -(-chunks // (segments * most)))
    return BackwardCut(group, segments, max(1, -(-chunks // (segments * parts))))


def coarse_chunks(batch: int, length: int, heads: int, num_packed: int = 0) -> int:
    """Return the number of chunks between the states that the forward pass saves for the backward pass."""
    return cut_backward(batch, num_chunks(length, num_packed), heads).coarse


def coarse_pieces(length: int, coarse: int, num_packed: int = 0) -> int:
    """Return the number of states kept of a sequence, without its initial one; 0 when `coarse` is 0."""
    return max(0, -(-num_chunks(length, num_packed) // coarse) - 1) if coarse else 0


def kept_shape(call: ScanCall, coarse: int) -> tuple[int, ...]:
    """Return the shape [B, pieces, H, K, V] of the states that the forward pass keeps, `coarse` chunks apart."""
    batch, length, heads, _ = call.q.shape
    return (batch, coarse_pieces(length, coarse, call.num_packed()), heads, WIDTH, WIDTH)


class HeadGroup(NamedTuple):
    """Heads that run together."""

    first: int
    count: int


class ChunkRange(NamedTuple):
    """Chunks of every sequence that run together, from `first` to before `end`, in segments of `segment` chunks."""

    first: int
    end: int
    segment: int

    @property
    def chunks(self) -> int:
        """Return the number of chunks."""
        return self.end - self.first

    @property
    def segments(self) -> int:
        """Return the number of segments."""
        return -(-self.chunks // self.segment)


class Plan:
    """Division of the work of a call.

    Args:
        batch: B.
        length: T.
        heads: H.
        coarse: number of chunks between the states that the forward pass saves; 0 if it saves none.
        num_packed: N of packed sequences, else 0.

    Attributes:
        chunks: chunks of a sequence, or the most that packed sequences can have.
        backward: division of the backward pass.
        groups: its groups of heads.
        pieces: number of states kept of a sequence.
        whole: all chunks, in segments for the forward pass.
        parts: chunks of each part of the backward pass, from the last to the first.
    """

    def __init__(self, batch: int, length: int, heads: int, coarse: int, num_packed: int = 0):
        self.chunks = num_chunks(length, num_packed)
        self.backward = cut_backward(batch, self.chunks, heads)
        most, part = self.backward.heads, self.backward.part
        self.groups = [HeadGroup(h, min(most, heads - h)) for h in range(0, heads, most)]
        self.pieces = coarse_pieces(length, coarse, num_packed)
        self.whole = ChunkRange(0, self.chunks, segment_chunks(batch * heads, self.chunks))
        starts = reversed(range(0, self.chunks, part))
        self.parts = [ChunkRange(at, min(at + part, self.chunks), self.backward.coarse) for at in starts]
