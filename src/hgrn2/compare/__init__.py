"""Compare models: a grid of models, tasks, seeds and learning rates, trained alike and reported on one page."""

from hgrn2.compare.comparison import compare, report
from hgrn2.compare.config import Comparison

__all__ = ["Comparison", "compare", "report"]
