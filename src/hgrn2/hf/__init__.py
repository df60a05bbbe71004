"""HGRN2 as models of transformers; importing this module registers them with the Auto classes."""

from hgrn2.hf.cache import StateLayer
from hgrn2.hf.classification import HGRN2ForSequenceClassification
from hgrn2.hf.configuration import HGRN2Config
from hgrn2.hf.language import HGRN2ForCausalLM
from hgrn2.hf.modeling import HGRN2Model, HGRN2PreTrainedModel
from hgrn2.hf.registration import register

register()

__all__ = [
    "HGRN2Config",
    "HGRN2ForCausalLM",
    "HGRN2ForSequenceClassification",
    "HGRN2Model",
    "HGRN2PreTrainedModel",
    "StateLayer",
    "register",
]
