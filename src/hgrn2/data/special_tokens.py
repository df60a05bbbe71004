"""Keep control tokens out of encoded text, even if the vocabulary lists them as words."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers


def hide_tokens(content: Mapping[str, Any], names: Collection[str]) -> tokenizers.Tokenizer | None:
    """Return a copy of a tokenizer that never produces certain tokens.

    `encode_special_tokens` alone is not enough: SentencePiece, WordLevel and WordPiece models match a token by its
    spelling if it is in their vocabulary, and added tokens not marked special are extracted first. The copy keeps the
    ids of these tokens under names that cannot occur in a text.

    Args:
        content: the content of a tokenizer.json.
        names: the tokens to hide.

    Returns:
        The changed tokenizer, without BPE dropout; None if nothing has to change.
    """
    model = content["model"]
    reachable = _reachable(model, names)
    cut_out = any(token["content"] in names and not token["special"] for token in content["added_tokens"])
    if not reachable and not cut_out and not model.get("dropout"):
        return None
    import tokenizers

    # a null character cannot occur in a text: files with one are refused as binary
    new_names = {name: f"\0{name}\0" for name in reachable}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model = model | {"vocab": {new_names.get(token, token): token_id for token, token_id in vocab.items()}}
    else:
        model = model | {"vocab": [[new_names.get(token, token), score] for token, score in vocab]}
    if model.get("unk_token") in new_names:
        model = model | {"unk_token": new_names[model["unk_token"]]}
    if model.get("dropout"):
        # with BPE dropout the same text would give different tokens each time
        model = model | {"dropout": None}
    if model.get("merges"):
        model = model | {"merges": [merge for merge in model["merges"] if not reachable & set(_merged(merge))]}
    added = [
        token | {"content": new_names.get(token["content"], token["content"]), "special": True}
        if token["content"] in names
        else token
        for token in content["added_tokens"]
    ]
    # a template would refer to the tokens by their old names
    changed = {**content, "model": model, "added_tokens": added, "post_processor": None}
    backend = tokenizers.Tokenizer.from_str(json.dumps(changed, ensure_ascii=False))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _reachable(model: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Return those of the names that the model could produce from a text."""
    vocab = model["vocab"]
    listed = {
        token for token in (vocab if isinstance(vocab, dict) else (entry[0] for entry in vocab)) if token in names
    }
    if model["type"] != "BPE" or model.get("ignore_merges"):
        return listed
    # BPE produces single characters and the results of its merges only
    made = {token for merge in model["merges"] for token in _merged(merge)}
    return {token for token in listed if len(token) == 1 or token in made}


def _merged(merge: str | list[str]) -> tuple[str, str, str]:
    """Return the two parts of a merge and their concatenation."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right
