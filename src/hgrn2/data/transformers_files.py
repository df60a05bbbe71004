"""Write a tokenizer in the files that transformers opens, beside or instead of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hgrn2.data.model_files import GENERATION_CONFIG_FILE
from hgrn2.data.tokenizer import EOT_NAMES, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, HFTokenizer, Tokenizer
from hgrn2.data.tokenizer_kinds import byte_alphabet
from hgrn2.storage.staging import write_text_atomic


def write_transformers_files(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, so that `AutoTokenizer` returns our tokens.

    Texts begin with the end-of-text token, as in `hgrn2 generate`; `add_special_tokens=False` omits it. Unlike our
    tokenizers, those of transformers parse "<|endoftext|>" written in a text as that token.

    Args:
        tokenizer: a byte tokenizer or a Hugging Face tokenizer.
        directory: an existing folder.

    Raises:
        OSError: a file cannot be written.
    """
    if isinstance(tokenizer, HFTokenizer):
        content = json.loads(tokenizer.backend.to_str())
        eot = tokenizer.backend.id_to_token(tokenizer.eot_id)
    else:
        eot = EOT_NAMES[0]
        content = _bytes_content(eot, tokenizer.eot_id)
    start, a, b = {"SpecialToken": {"id": eot, "type_id": 0}}, *({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, a],
        "pair": [start, a, b],
        "special_tokens": {eot: {"id": eot, "ids": [tokenizer.eot_id], "tokens": [eot]}},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot,
        "eos_token": eot,
        "pad_token": eot,
        # generation continues from the last position of a row
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for name, values in ((TOKENIZER_FILE, content), (TOKENIZER_CONFIG_FILE, settings)):
        write_text_atomic(Path(directory) / name, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_generation_config(tokenizer: Tokenizer, vocab_size: int, directory: str | Path) -> dict[str, Any]:
    """Write generation_config.json, so that `generate` uses the same start, end and tokens as `hgrn2 generate`.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: vocabulary of the model, which may be larger than the tokenizer's; the extra ids are suppressed.
        directory: an existing folder.

    Returns:
        The ids of the BOS, EOS and padding tokens, which belong in config.json as well.

    Raises:
        OSError: the file cannot be written.
    """
    ids = {f"{use}_token_id": tokenizer.eot_id for use in ("bos", "eos", "pad")}
    values: dict[str, Any] = dict(ids)
    if vocab_size > tokenizer.vocab_size:
        values["suppress_tokens"] = list(range(tokenizer.vocab_size, vocab_size))
    write_text_atomic(Path(directory) / GENERATION_CONFIG_FILE, json.dumps(values, indent=2) + "\n")
    return ids


def _bytes_content(eot: str, eot_id: int) -> dict[str, Any]:
    """Return a tokenizer.json with a byte-level vocabulary and no merges, so that every token is one byte."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    alphabet = sorted(byte_alphabet().items(), key=lambda item: item[1])
    special = {"content": eot, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": eot_id, **special, "special": True}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {**dict(alphabet), eot: eot_id}, "merges": []},
    }
