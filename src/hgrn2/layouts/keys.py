"""Keys of a config.json that are about something else than the numbers a model computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.models.config import MODEL_TYPE

# what transformers, old and new, writes into the file of any model
TRANSFORMERS_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_internal _commit_hash _name_or_path architectures auto_map dtype torch_dtype
    transformers_version model_type return_dict output_hidden_states output_attentions use_cache use_return_dict torchscript
    chunk_size_feed_forward is_encoder_decoder is_decoder add_cross_attention cross_attention_hidden_size
    tie_encoder_decoder pruned_heads use_bfloat16 id2label label2id num_labels problem_type finetuning_task
    task_specific_params tokenizer_class prefix pad_token_id bos_token_id eos_token_id sep_token_id
    decoder_start_token_id classifier_dropout
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    tf_legacy_loss pretraining_tp layer_types keys_to_ignore_at_inference
    """.split()
)


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
        raise UserError(f"{what}: model_type is {found!r}; wanted {MODEL_TYPE!r}")
    known = set(known)
    passed_over = TRANSFORMERS_KEYS | set(inert)
    for key in values:
        if key not in known and key not in passed_over:
            raise UserError(
                f"{unknown_key_message(what, key, known)}; it may change what the model computes, "
                "so take it out only if it does not"
            )
    return {key: value for key, value in values.items() if key in known}
