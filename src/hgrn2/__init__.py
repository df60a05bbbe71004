"""HGRN2: gated linear RNNs with state expansion (arXiv 2404.07904)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hgrn2 import models, nn, ops
    from hgrn2.loading import load
    from hgrn2.models import HGRN2LM, AttentionConfig, HGRN2Config, ModelState, Sampling, presets
    from hgrn2.nn import HGRN2Mixer

__version__ = "0.1.0"

__all__ = [
    "HGRN2LM", "AttentionConfig", "HGRN2Config", "HGRN2Mixer", "ModelState", "Sampling", "__version__", "load",
    "models", "nn", "ops", "presets",
]  # fmt: skip

_SUBPACKAGES = {"models", "nn", "onnx", "ops", "serve"}
# modules of public names; all others are in hgrn2.models
_HOMES = {"HGRN2Mixer": "hgrn2.nn", "load": "hgrn2.loading"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch takes seconds to import, and parts of the package do not need it."""
    if name in _SUBPACKAGES:
        return import_module(f"hgrn2.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "hgrn2.models")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
