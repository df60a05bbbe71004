"""HGRN2: gated linear RNNs with state expansion (arXiv 2404.07904)."""

from hgrn2 import ops
from hgrn2.models import HGRN2LM, AttentionConfig, HGRN2Config, ModelState, presets

__version__ = "0.1.0"

__all__ = ["HGRN2LM", "AttentionConfig", "HGRN2Config", "ModelState", "__version__", "ops", "presets"]
