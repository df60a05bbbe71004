"""Counts in words, and perplexity."""

from __future__ import annotations

import math


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 document" or "2,000 documents"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def perplexity(nats: float) -> float:
    """Return exp of a cross entropy in nats per token; inf where it does not fit a float.

    Example:
        >>> round(perplexity(math.log(8)), 3)
        8.0
    """
    return math.exp(nats) if nats < 700 else math.inf
