"""Check the keys of a config.json, and refuse settings that a layout or our model does not have."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.models.config import MODEL_TYPE, HGRN2Config

# keys that transformers, old and new, writes for any model
TRANSFORMERS_KEYS = frozenset((
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_name_or_path", "add_cross_attention",
    "architectures", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "classifier_dropout", "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
    "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder",
    "keys_to_ignore_at_inference", "label2id", "layer_types", "length_penalty", "max_length",
    "max_position_embeddings", "min_length", "model_type", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty",
    "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers_version", "typical_p", "use_bfloat16", "use_cache", "use_return_dict",
))  # fmt: skip


def check_keys(values: Any, what: str, known: Iterable[str], inert: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings of a config.json that affect the model's results, and refuse unknown keys.

    Args:
        values: the content of the file.
        what: the layout, for messages.
        known: keys that affect the results.
        inert: keys that do not, besides transformers' own.

    Raises:
        UserError: not a table, an unknown key, or another model type.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{what}: found {type(values).__name__}; wanted a table of settings")
    found = values.get("model_type", MODEL_TYPE)
    if found != MODEL_TYPE:
        raise UserError(f"{what}: model_type is {found!r}; wanted {MODEL_TYPE!r}", "unsupported")
    known = set(known)
    ignored = TRANSFORMERS_KEYS | set(inert)
    for key in values:
        if key not in known and key not in ignored:
            raise UserError(
                f"{unknown_key_message(what, key, known)}; it may change what the model computes, "
                "so remove it only if it does not",
                "unknown-name",
            )
    return {key: value for key, value in values.items() if key in known}


def refuse(what: str, key: str, found: Any, wanted: str) -> NoReturn:
    """Refuse a setting that our model does not implement.

    Args:
        what: the layout, for the message.
        key: the key in the file.
        found: its value.
        wanted: the supported values.

    Raises:
        UserError: always.
    """
    raise UserError(f"{what}: {key} is {found!r}; wanted {wanted} (our model supports nothing else)", "unsupported")


def require(config: HGRN2Config, layout: str, wanted: Mapping[str, Any]) -> None:
    """Refuse a configuration that another layout cannot express.

    Args:
        config: our configuration.
        layout: the name of the layout, for the message.
        wanted: values that every model of that layout has, by our keys.

    Raises:
        UserError: a key has another value.
    """
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise UserError(
                f"{layout}'s layout cannot express {key.removeprefix('head_')} = {getattr(config, key)!r}; "
                f"a model in it has {value!r}. "
                "Write another layout",
                "unsupported",
            )


def warn_of_training_keys(config: HGRN2Config, layout: str, keys: Mapping[str, tuple[Any, ...]]) -> None:
    """Warn about settings that a layout does not have and that only affect training.

    Args:
        config: our configuration.
        layout: the name of the layout, for the message.
        keys: our keys, with the values that need no warning.
    """
    for key, silent in keys.items():
        if getattr(config, key) not in silent:
            warnings.warn(
                f"{layout}'s layout has no {key}; {getattr(config, key)} is left out, which matters in training only",
                UserWarning,
                stacklevel=3,
            )
