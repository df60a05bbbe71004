"""How the work of the CUDA kernels is cut: from shapes alone, so that a traced program can hold the numbers."""

from __future__ import annotations

WIDTH = 128  # K = V
CHUNK = 64  # tokens
# of an H100 or H200; on another chip a cut that fits less well is slower, not wrong
MULTIPROCESSORS = 132
# heads are worked on in groups whose chunk states, and the gradients of those, fit here each
STATE_BYTES = 1 << 27


def num_chunks(length: int) -> int:
    """Chunks of a sequence."""
    return -(-length // CHUNK)


def segment_chunks(rows: int, chunks: int) -> int:
    """Chunks of a segment, such that rows (sequences times heads) of segments keep every multiprocessor busy once.

    Args:
        rows: sequences times heads that are worked on together.
        chunks: of a sequence.
    """
    segments = max(1, min(chunks, MULTIPROCESSORS // max(1, rows)))
    return max(1, -(-chunks // segments))


def group_size(batch: int, chunks: int, heads: int) -> int:
    """Heads the backward pass works on together; groups are as equal as can be."""
    # bfloat16, the only dtype with a backward pass here
    most = max(1, STATE_BYTES // max(1, batch * chunks * WIDTH * WIDTH * 2))
    groups = -(-heads // min(heads, most))
    return -(-heads // groups)


def coarse_chunks(batch: int, length: int, heads: int) -> int:
    """Chunks between two coarse states, which are a segment of the backward pass."""
    chunks = num_chunks(length)
    return segment_chunks(batch * group_size(batch, chunks, heads), chunks)
