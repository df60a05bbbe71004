"""Image models with timm's interface; `import hgrn2.timm` registers them with timm."""

import sys

from hgrn2.models.vision.config import VisionConfig
from hgrn2.models.vision.contribution import token_contribution
from hgrn2.models.vision.model import VisionModel
from hgrn2.models.vision.presets import PRESETS, preset
from hgrn2.models.vision.saving import load_model, save_model
from hgrn2.models.vision.timm_registry import register_with_timm

__all__ = [
    "PRESETS",
    "VisionConfig",
    "VisionModel",
    "load_model",
    "preset",
    "register_with_timm",
    "save_model",
    "token_contribution",
]

# importing timm takes seconds, so programs that do not use it are spared
if "timm" in sys.modules:
    register_with_timm()
