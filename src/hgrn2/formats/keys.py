"""Keys of a config.json that are about something else than the numbers a model computes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.models.config import MODEL_TYPE, HGRN2Config

# what transformers, old and new, writes into the file of any model
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
    """The keys of a config.json that decide what is computed, each of them known.

    Args:
        values: what the file holds.
        what: the layout, for messages.
        known: keys that decide.
        inert: further keys that do not; transformers' own are never counted.

    Raises:
        UserError: it is no table, a key is unknown, or the model type is another.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{what}: found {type(values).__name__}; wanted a table of settings")
    found = values.get("model_type", MODEL_TYPE)
    if found != MODEL_TYPE:
        raise UserError(f"{what}: model_type is {found!r}; wanted {MODEL_TYPE!r}", "unsupported")
    known = set(known)
    passed_over = TRANSFORMERS_KEYS | set(inert)
    for key in values:
        if key not in known and key not in passed_over:
            raise UserError(
                f"{unknown_key_message(what, key, known)}; it may change what the model computes, "
                "so take it out only if it does not",
                "unknown-name",
            )
    return {key: value for key, value in values.items() if key in known}


def refuse(what: str, key: str, found: Any, wanted: str) -> NoReturn:
    """Refuses a setting whose computation our model does not have.

    Args:
        what: the layout, for the message.
        key: the file's.
        found: its value.
        wanted: the values that our model computes.

    Raises:
        UserError: always.
    """
    raise UserError(f"{what}: {key} is {found!r}; wanted {wanted}, for our model computes nothing else", "unsupported")


def require(config: HGRN2Config, layout: str, wanted: Mapping[str, Any]) -> None:
    """Refuses a configuration that another layout cannot say.

    Args:
        config: ours.
        layout: its name, for the message.
        wanted: what a model of that layout always has, by our key.

    Raises:
        UserError: the first key that has another value.
    """
    for key, value in wanted.items():
        if getattr(config, key) != value:
            raise UserError(
                f"{layout}'s layout cannot say {key.removeprefix('head_')} = {getattr(config, key)!r}; "
                f"a model in it has {value!r}. "
                "Write another layout",
                "unsupported",
            )


def warn_of_training_keys(config: HGRN2Config, layout: str, keys: Mapping[str, tuple[Any, ...]]) -> None:
    """Warns of settings that a layout has no place for, and that matter in training alone.

    Args:
        config: ours.
        layout: its name, for the message.
        keys: our keys, with the values that need no warning.
    """
    for key, silent in keys.items():
        if getattr(config, key) not in silent:
            warnings.warn(
                f"{layout}'s layout has no {key}; {getattr(config, key)} is left out, which matters in training only",
                UserWarning,
                stacklevel=3,
            )
