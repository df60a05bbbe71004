"""Register the classes with transformers' Auto classes."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto import modeling_auto

from hgrn2.hf.classification import HGRN2ForSequenceClassification
from hgrn2.hf.configuration import HGRN2Config
from hgrn2.hf.language import HGRN2ForCausalLM
from hgrn2.hf.modeling import HGRN2Model


def register() -> None:
    """Register the classes for the model type "hgrn2" with `AutoConfig`, `AutoModel` and the others.

    Importing `hgrn2.hf` calls it. The last registration of a model type wins: if flash-linear-attention, which uses the
    same one, is imported later in the same process, call this again.
    """
    AutoConfig.register(HGRN2Config.model_type, HGRN2Config, exist_ok=True)
    AutoModel.register(HGRN2Config, HGRN2Model, exist_ok=True)
    AutoModelForCausalLM.register(HGRN2Config, HGRN2ForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(HGRN2Config, HGRN2ForSequenceClassification, exist_ok=True)
    # the Trainer also reads these tables, for example to know whether label smoothing must shift labels; `register`
    # does not change them
    for names, cls in (
        (modeling_auto.MODEL_MAPPING_NAMES, HGRN2Model),
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, HGRN2ForCausalLM),
        (modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, HGRN2ForSequenceClassification),
    ):
        names[HGRN2Config.model_type] = cls.__name__
