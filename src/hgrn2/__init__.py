"""HGRN2: gated linear RNNs with state expansion (arXiv 2404.07904)."""

__version__ = "0.1.0"

__all__ = ["__version__"]
