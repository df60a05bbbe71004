"""Generate text with a model, and measure how well it predicts text."""

from hgrn2.inference.scoring import Score, score
from hgrn2.inference.writing import Writer

__all__ = ["Score", "Writer", "score"]
