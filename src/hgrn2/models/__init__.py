"""Whole models and their configurations."""

from hgrn2.models import presets
from hgrn2.models.body import HGRN2Model
from hgrn2.models.config import HGRN2Config
from hgrn2.models.language import HGRN2LM
from hgrn2.models.outputs import LossOutput
from hgrn2.models.pattern import AttentionConfig
from hgrn2.models.sampling import Sampling
from hgrn2.models.state import ModelState

__all__ = ["HGRN2LM", "AttentionConfig", "HGRN2Config", "HGRN2Model", "LossOutput", "ModelState", "Sampling", "presets"]
