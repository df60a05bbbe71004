"""Derive properties of a tokenizer from its tokenizer.json: byte-level, byte fallback, splits at spaces."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


def _parts(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the parts of a normalizer, pre-tokenizer or decoder in order, with Sequences flattened."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for inner in component[key] for part in _parts(inner, key)]


def byte_level_table(
    content: dict[str, Any], vocab: dict[str, int], added: set[int], special: Collection[int]
) -> dict[int, bytes] | None:
    """Return the bytes of every token of a byte-level tokenizer; None for other kinds of tokenizer."""
    kinds = {part["type"] for part in _parts(content.get("decoder"), "decoders")}
    if "ByteLevel" not in kinds or not kinds <= {"ByteLevel", "Fuse"}:
        return None
    alphabet = byte_alphabet()
    table = {}
    for token, token_id in vocab.items():
        if token_id in special:
            table[token_id] = b""
        elif token_id not in added and all(char in alphabet for char in token):
            table[token_id] = bytes(alphabet[char] for char in token)
        else:
            table[token_id] = token.encode("utf-8")
    return table


def unknown_id(model: dict[str, Any], vocab: dict[str, int]) -> int | None:
    """Return the id of the unknown token; None if the tokenizer has none."""
    return model["unk_id"] if model["type"] == "Unigram" else vocab.get(model.get("unk_token") or "")


def fallback_tokens(content: dict[str, Any], vocab: dict[str, int]) -> frozenset[int]:
    """Return the ids of the tokens that a decoder with byte fallback reads as single bytes."""
    kinds = {part["type"] for part in _parts(content.get("decoder"), "decoders")}
    if "ByteFallback" not in kinds:
        return frozenset()
    return frozenset(vocab[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in vocab)


def splits_as_gpt2(content: dict[str, Any], hidden: Collection[str]) -> bool:
    """Return whether words are split by GPT-2's pattern alone: no prefix space, normalizer or added tokens."""
    split = content.get("pre_tokenizer") or {}
    is_gpt2 = split.get("type") == "ByteLevel" and not split["add_prefix_space"] and split.get("use_regex", True)
    others = [token["content"] for token in content["added_tokens"] if token["content"] not in hidden]
    return is_gpt2 and content.get("normalizer") is None and not others


def keeps_every_byte(content: dict[str, Any], vocab: dict[str, int], hidden: Collection[str]) -> bool:
    """Return whether the settings of a byte-level tokenizer show that decoding restores every text."""
    kept = {"ByteLevel", "Split", "Digits"}
    splits = _parts(content.get("pre_tokenizer"), "pretokenizers")
    plain = all(part["type"] in kept and part.get("behavior") != "Removed" for part in splits)
    prefix = any(part.get("add_prefix_space") for part in splits)
    known = all(char in vocab for char in byte_alphabet())
    others = [token for token in content["added_tokens"] if token["content"] not in hidden]
    eats_spaces = any(token["lstrip"] or token["rstrip"] for token in others)
    no_byte_level = not any(part["type"] == "ByteLevel" for part in splits)
    return (
        plain and known and not prefix and not eats_spaces and not no_byte_level and content.get("normalizer") is None
    )


def byte_alphabet() -> dict[str, int]:
    """Return the map from the printable characters of byte-level vocabularies to their bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
