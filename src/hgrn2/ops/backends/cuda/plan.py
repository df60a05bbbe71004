"""How the work of the CUDA kernels is cut: from shapes alone, so that a traced program can hold the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hgrn2.ops.call import ScanCall

WIDTH = 128  # K = V
CHUNK = 64  # tokens
# of an H100 or H200; on another chip a cut that fits less well is slower, not wrong
MULTIPROCESSORS = 132
# chunk states that are kept at a time in the backward pass, 64 MiB, with room for as many gradients of them
STATES = 2048
# shorter walks would spend their time on starting
SHORTEST_WALK = 8


def num_chunks(length: int, num_packed: int = 0) -> int:
    """Chunks of a sequence or, at most, of packed sequences of that length together, each of which may end in one."""
    return -(-length // CHUNK) + num_packed


def segment_chunks(rows: int, chunks: int) -> int:
    """Chunks of a segment, such that rows (sequences times heads) of segments keep every multiprocessor busy once.

    Args:
        rows: sequences times heads that are worked on together.
        chunks: of a sequence.
    """
    segments = max(1, min(chunks, MULTIPROCESSORS // max(1, rows)))
    return max(1, -(-chunks // segments))


@dataclass(frozen=True)
class Passes:
    """The backward pass: groups of heads, for each the parts of a sequence, from the last to the first.

    Attributes:
        heads: of a group; groups are as equal as can be.
        segments: of a part, which are walked side by side.
        coarse: chunks of a segment, and between two states that the forward pass keeps.
    """

    heads: int
    segments: int
    coarse: int

    @property
    def part(self) -> int:
        """Chunks of a part."""
        return self.segments * self.coarse


def passes(batch: int, chunks: int, heads: int) -> Passes:
    """Groups of heads, and segments, that keep the chip busy once; walks as long as STATES allows.

    They are not shorter than SHORTEST_WALK: beyond 256 sequences more than STATES are there at a time.

    Args:
        batch: sequences.
        chunks: of a sequence.
        heads: H.
    """
    most = min(heads, max(1, MULTIPROCESSORS // max(1, batch)))
    group = -(-heads // -(-heads // most))
    rows = max(1, batch * group)
    segments = max(1, min(chunks, MULTIPROCESSORS // rows))
    most = max(SHORTEST_WALK, STATES // (rows * segments))
    # parts of equal length: a short last one would keep few multiprocessors busy
    parts = max(1, -(-chunks // (segments * most)))
    return Passes(group, segments, max(1, -(-chunks // (segments * parts))))


def coarse_chunks(batch: int, length: int, heads: int, num_packed: int = 0) -> int:
    """Chunks between two of the states that the forward pass keeps for the backward pass."""
    return passes(batch, num_chunks(length, num_packed), heads).coarse


def coarse_pieces(length: int, coarse: int, num_packed: int = 0) -> int:
    """How many states are kept of a sequence; none with a distance of 0. The one it begins with is not among them."""
    return max(0, -(-num_chunks(length, num_packed) // coarse) - 1) if coarse else 0


def kept_shape(call: ScanCall, coarse: int) -> tuple[int, ...]:
    """Return the shape [B, pieces, H, K, V] of the states that the forward pass keeps, `coarse` chunks apart."""
    batch, length, heads, _ = call.q.shape
    return (batch, coarse_pieces(length, coarse, call.num_packed()), heads, WIDTH, WIDTH)


class Group(NamedTuple):
    """Heads that are worked on together."""

    first: int
    count: int


class Stretch(NamedTuple):
    """Chunks of every sequence that are worked on together: from the first to before `end`, in segments."""

    first: int
    end: int
    segment: int

    @property
    def chunks(self) -> int:
        """How many there are."""
        return self.end - self.first

    @property
    def segments(self) -> int:
        """How many segments."""
        return -(-self.chunks // self.segment)


class Plan:
    """How the work of a call is cut.

    Args:
        batch: B.
        length: T.
        heads: H.
        coarse: chunks between the states that the forward pass keeps; 0 where it keeps none.
        num_packed: N of packed sequences, else 0.

    Attributes:
        chunks: of a sequence; of packed ones together, at most.
        passes: of the backward pass.
        groups: heads of each pass.
        pieces: how many states are kept of a sequence.
        whole: all chunks, in segments that keep the chip busy.
        parts: those of the backward pass, from the last to the first.
    """

    def __init__(self, batch: int, length: int, heads: int, coarse: int, num_packed: int = 0):
        self.chunks = num_chunks(length, num_packed)
        self.passes = passes(batch, self.chunks, heads)
        most, part = self.passes.heads, self.passes.part
        self.groups = [Group(h, min(most, heads - h)) for h in range(0, heads, most)]
        self.pieces = coarse_pieces(length, coarse, num_packed)
        self.whole = Stretch(0, self.chunks, segment_chunks(batch * heads, self.chunks))
        starts = reversed(range(0, self.chunks, part))
        self.parts = [Stretch(at, min(at + part, self.chunks), self.passes.coarse) for at in starts]
