"""Tokenizers: plain bytes without a file, or any Hugging Face tokenizer.

Every tokenizer has an end-of-text token, which separates documents and starts a text. `encode` never produces it:
control tokens written in a text are encoded as plain characters.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hgrn2.data.special_tokens import hide_tokens
from hgrn2.data.tokenizer_kinds import byte_level_table, fallback_tokens, keeps_every_byte, splits_as_gpt2, unknown_id
from hgrn2.errors import UserError
from hgrn2.storage.staging import write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    import tokenizers

# names of the end-of-text token in published tokenizers, most specific first
EOT_NAMES = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eos|>",
    "<|im_end|>",
    "[EOS]",
    "<|eot_id|>",
)

TOKENIZER_FILE = "tokenizer.json"
BYTES_FILE = "bytes_tokenizer.json"
BYTES_MARKER = {"format": "hgrn2-tokenizer", "name": "bytes"}
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# characters before a text that can affect how its first word is encoded
_CONTEXT_CHARS = 16
# fallback contexts, for when the last character before a text and its first one form a single token
_SEPARATORS = ("\n", ".", "-", "0")


class Tokenizer(ABC):
    """Interface of a tokenizer.

    Attributes:
        name: "bytes", a file name or a Hub name; used in messages.
        vocab_size: the largest token id plus one.
        eot_id: the end-of-text token, which separates documents.
        end_ids: tokens that end generation, including eot_id.
        start_ids: tokens that a model reads before a text.
        companions: other files of the tokenizer's model, such as its chat template, by their path in its folder; `save`
            writes them too.
    """

    name: str
    vocab_size: int
    eot_id: int
    end_ids: frozenset[int]
    start_ids: tuple[int, ...]
    companions: Mapping[str, bytes] = {}

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text, one 1-D integer array a text, without special tokens."""

    @abstractmethod
    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text of token ids; special tokens, such as the end of text, decode to nothing.

        Args:
            ids: token ids.
            errors: how to handle bytes that are not UTF-8 and ids outside the vocabulary: "replace", "ignore" or
                "strict".
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token, b"" if it is special; None if its text depends on its neighbours."""

    @abstractmethod
    def save(self, directory: str | Path) -> Path:
        """Write the tokenizer into a directory for `load_tokenizer`; return the path of the file.

        Raises:
            OSError: the file cannot be written; an existing file stays as it was.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hex digest, equal for tokenizers that encode alike."""

    @property
    def splits_anywhere(self) -> bool:
        """Whether a text may be cut at any character without changing its tokens."""
        return False

    @property
    def splits_at_spaces(self) -> bool:
        """Whether a text may be cut before white space, and after a line end between two non-space characters."""
        return False

    @property
    def is_lossless(self) -> bool:
        """Whether decoding restores every text; False if each text has to be checked."""
        return False

    def is_inside_run(self, token_id: int) -> bool:
        """Return whether later tokens may change the text of this token at the end of a sequence."""
        return False

    def count_unknown(self, ids: np.ndarray) -> int:
        """Return the number of unknown tokens, which replace text that the vocabulary lacks."""
        return 0

    def unknown_parts(self, text: str) -> list[str]:
        """Return the parts of a text that the vocabulary lacks, in order."""
        return []

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        return self.encode_batch([text])[0].tolist()

    def continue_text(self, text: str, before: str) -> list[int]:
        """Return the token ids of a text that continues another.

        Many tokenizers encode the start of a text as if a space came before it. In the middle of a text that space
        would be wrong.

        Args:
            text: the text to encode.
            before: the text before it, already encoded; its tokens do not change.
        """
        if not text or not before or self.splits_anywhere:
            return self.encode(text)
        for context in (before[-_CONTEXT_CHARS:], *_SEPARATORS):
            head, whole = self.encode(context), self.encode(context + text)
            if head and whole[: len(head)] == head:
                return whole[len(head) :]
        return self.encode(text)

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise UserError if the model's vocabulary is smaller than the tokenizer's."""
        if self.vocab_size > model_vocab_size:
            raise UserError(
                f"tokenizer {self.name!r} has {self.vocab_size} tokens but the model has vocab_size "
                f"{model_vocab_size}; use the model's own tokenizer, or vocab_size >= {self.vocab_size}",
                "mismatch",
            )

    def _save_companions(self, directory: str | Path) -> None:
        for name, data in self.companions.items():
            path = Path(directory) / name
            path.parent.mkdir(exist_ok=True)
            write_bytes_atomic(path, data)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as tokens 0 to 255, and the end of text as token 256.

    Example:
        >>> ByteTokenizer().encode("hé")
        [104, 195, 169]
    """

    name = "bytes"
    vocab_size = 257
    eot_id = 256
    end_ids = frozenset({256})
    start_ids = (256,)

    @property
    def splits_anywhere(self) -> bool:
        """True: a token is a byte."""
        return True

    @property
    def is_lossless(self) -> bool:
        """True: every byte is a token."""
        return True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as uint8 arrays."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text of token ids; the end-of-text token decodes to nothing."""
        return _join_bytes(self, ids, errors)

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the byte itself, b"" for the end-of-text token."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return bytes([token_id]) if token_id < 256 else b""

    def save(self, directory: str | Path) -> Path:
        """Write a marker file; bytes need no vocabulary."""
        path = Path(directory) / BYTES_FILE
        write_text_atomic(path, json.dumps(BYTES_MARKER, indent=2) + "\n")
        self._save_companions(directory)
        return path

    def fingerprint(self) -> str:
        """Return a hex digest."""
        return hashlib.sha256(b"hgrn2 bytes 257").hexdigest()


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer (`tokenizers` library) without its template of special tokens.

    Args:
        backend: the tokenizer; its truncation and padding are switched off.
        name: name used in messages.
        eot: the end-of-text token if the vocabulary has none of `EOT_NAMES`.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        name: str = "tokenizer",
        *,
        eot: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        # "<|endoftext|>" written in a text must not become a document boundary
        backend.encode_special_tokens = True
        self.backend = backend
        self.name = name
        vocab = backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"tokenizer {name!r} has an empty vocabulary", "unsupported")
        self.vocab_size = max(vocab.values()) + 1
        self._eot = next((found for found in (*EOT_NAMES, eot) if found in vocab), None)
        if self._eot is None:
            raise UserError(
                f"tokenizer {name!r} has no end-of-text token (looked for {', '.join(EOT_NAMES)}); "
                "add one of these as a special token",
                "unsupported",
            )
        self.eot_id = vocab[self._eot]
        self.end_ids = frozenset({self.eot_id})
        self.start_ids = (self.eot_id,)
        content = json.loads(backend.to_str())
        added = backend.get_added_tokens_decoder()
        self._special = {i for i, token in added.items() if token.special} | {self.eot_id}
        hidden = {token for token, token_id in vocab.items() if token_id in self._special}
        self._encoder = hide_tokens(content, hidden) or backend
        self._bytes = byte_level_table(content, vocab, set(added), self._special)
        self._unknown = unknown_id(content["model"], vocab)
        self._byte_tokens = fallback_tokens(content, vocab)
        self._splits_at_spaces = splits_as_gpt2(content, hidden)
        self._is_lossless = self._bytes is not None and keeps_every_byte(content, vocab, hidden)

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer", eot: str | None = None) -> HFTokenizer:
        """Make a tokenizer from the text of a tokenizer.json.

        Args:
            text: the content of the file.
            name: name used in messages.
            eot: the end-of-text token if the vocabulary has none of `EOT_NAMES`.

        Raises:
            UserError: the tokenizers library cannot read the text, or there is no end-of-text token.
        """
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"{name}: not a tokenizer.json that the tokenizers library reads: {error}", "unreadable"
            ) from error
        return cls(backend, name, eot=eot)

    def __reduce__(self):
        return HFTokenizer.from_json, (self.backend.to_str(), self.name, self._eot)

    def follow(self, eot: str | None, end_ids: Collection[int], start_ids: Sequence[int]) -> None:
        """Adopt the start and end tokens that a model's folder names.

        Args:
            eot: a token that ends generation, besides the end-of-text token; None adds none.
            end_ids: further end tokens; ids outside the vocabulary are ignored.
            start_ids: tokens before a text; if empty, a text still starts with the end-of-text token.
        """
        named = None if eot is None else self.backend.token_to_id(eot)
        ends = [*end_ids, *([] if named is None else [named])]
        self.end_ids |= {token for token in ends if 0 <= token < self.vocab_size}
        self.start_ids = tuple(start_ids) or self.start_ids

    @property
    def splits_at_spaces(self) -> bool:
        """Whether the pre-tokenizer is GPT-2's, which splits at all white space."""
        return self._splits_at_spaces

    @property
    def is_lossless(self) -> bool:
        """Whether the tokenizer is byte-level and knows every byte."""
        return self._is_lossless

    def is_inside_run(self, token_id: int) -> bool:
        """Return whether the token is a fallback byte; consecutive fallback bytes are decoded together."""
        return token_id in self._byte_tokens

    def count_unknown(self, ids: np.ndarray) -> int:
        """Return the number of unknown tokens, which replace text that the vocabulary lacks."""
        return 0 if self._unknown is None else int((np.asarray(ids) == self._unknown).sum())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each text as int64 arrays; uses all cores."""
        try:
            encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"tokenizer {self.name!r} cannot encode some of the text ({error}); give it an unknown token, or use "
                "another tokenizer",
                "unsupported",
            ) from error
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def unknown_parts(self, text: str) -> list[str]:
        """Return the parts of a text that the vocabulary lacks, in order."""
        encoding = self._encoder.encode(text, add_special_tokens=False)
        found = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:stop] for token_id, (start, stop) in found if token_id == self._unknown]

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text of token ids; special tokens decode to nothing."""
        if self._bytes is not None:
            return _join_bytes(self, ids, errors)
        return self.backend.decode([int(i) for i in ids if int(i) not in self._special], skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token, b"" if it is special; None if the tokenizer is not byte-level."""
        if self._bytes is None:
            return b"" if token_id in self._special else None
        found = self._bytes.get(token_id)
        if found is None:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return found

    def save(self, directory: str | Path) -> Path:
        """Write tokenizer.json, and the companions if there are any."""
        path = Path(directory) / TOKENIZER_FILE
        write_text_atomic(path, self.backend.to_str(pretty=True))
        if self._eot not in EOT_NAMES and TOKENIZER_CONFIG_FILE not in self.companions:
            # the name is not among EOT_NAMES, so loading could not identify it otherwise
            write_text_atomic(Path(directory) / TOKENIZER_CONFIG_FILE, json.dumps({"eos_token": self._eot}) + "\n")
        self._save_companions(directory)
        return path

    def fingerprint(self) -> str:
        """Return a hex digest of the serialised tokenizer without its unused template of special tokens."""
        text = self.backend.to_str()
        if self.backend.post_processor is not None:
            content = json.loads(text) | {"post_processor": None}
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _join_bytes(tokenizer: Tokenizer, ids: Iterable[int], errors: str) -> str:
    pieces: list[bytes] = []
    for token_id in ids:
        try:
            pieces.append(tokenizer.token_bytes(int(token_id)) or b"")
        except ValueError:
            if errors == "strict":
                raise
            pieces.append("\ufffd".encode() if errors == "replace" else b"")
    return b"".join(pieces).decode("utf-8", errors)
