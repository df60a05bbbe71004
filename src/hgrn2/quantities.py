"""Format counts for messages and summaries."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 document" or "2,000 documents"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
