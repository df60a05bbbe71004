"""Text to token ids and back: bytes without any file, or any Hugging Face tokenizer.

Every tokenizer here has an end-of-text token. It is the document separator, the start symbol, and never
comes out of `encode`: control tokens written in a text are encoded as the plain characters they are.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hgrn2.data.staging import write_text_whole
from hgrn2.errors import UserError

if TYPE_CHECKING:
    import tokenizers

# the names under which published tokenizers keep their end-of-text token, most specific first
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


class Tokenizer(ABC):
    """What the rest of the package asks of a tokenizer.

    Attributes:
        name: "bytes", a file name or a Hub name; for people.
        vocab_size: one more than the largest token id.
        eot_id: the end-of-text token.
    """

    name: str
    vocab_size: int
    eot_id: int

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, one 1-D integer array a text, no special tokens added."""

    @abstractmethod
    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Text of token ids; special tokens (the end of text among them) give nothing.

        Args:
            ids: token ids.
            errors: for bytes that are not UTF-8 and ids outside the vocabulary: "replace", "ignore" or
                "strict".
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a token, b"" if it is special; None if its text depends on its neighbours."""

    @abstractmethod
    def save(self, directory: str | Path) -> Path:
        """Write the tokenizer into a directory, from which `load_tokenizer` reads it; return the file.

        Raises:
            OSError: it cannot be written; what was there before stays.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest; equal for tokenizers that encode alike."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        return self.encode_batch([text])[0].tolist()

    def check_fits(self, model_vocab_size: int) -> None:
        """Raise UserError if the model's vocabulary is smaller than the tokenizer's."""
        if self.vocab_size > model_vocab_size:
            raise UserError(
                f"tokenizer {self.name!r} has {self.vocab_size} tokens but the model has vocab_size "
                f"{model_vocab_size}; use the model's own tokenizer, or vocab_size >= {self.vocab_size}"
            )


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as tokens 0 to 255, and the end of text as token 256.

    Example:
        >>> ByteTokenizer().encode("hé")
        [104, 195, 169]
    """

    name = "bytes"
    vocab_size = 257
    eot_id = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint8 arrays."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Text of token ids; the end of text gives nothing."""
        return _join_bytes(self, ids, errors)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The byte itself; none for the end of text."""
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return bytes([token_id]) if token_id < 256 else b""

    def save(self, directory: str | Path) -> Path:
        """Write a marker file, since bytes need no vocabulary."""
        path = Path(directory) / BYTES_FILE
        write_text_whole(path, json.dumps(BYTES_MARKER, indent=2) + "\n")
        return path

    def fingerprint(self) -> str:
        """Hex digest."""
        return hashlib.sha256(b"hgrn2 bytes 257").hexdigest()


class HFTokenizer(Tokenizer):
    """A Hugging Face tokenizer (the `tokenizers` library), used without its own special-token template.

    Args:
        backend: the tokenizer; its truncation and padding are switched off.
        name: for people.

    Raises:
        UserError: it has no end-of-text token under any of the names in `EOT_NAMES`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, name: str = "tokenizer"):
        backend.no_truncation()
        backend.no_padding()
        # "<|endoftext|>" written in a text must not become a document boundary
        backend.encode_special_tokens = True
        self.backend = backend
        self.name = name
        vocab = backend.get_vocab(with_added_tokens=True)
        if not vocab:
            raise UserError(f"tokenizer {name!r} has an empty vocabulary")
        self.vocab_size = max(vocab.values()) + 1
        eot_id = next((vocab[eot] for eot in EOT_NAMES if eot in vocab), None)
        if eot_id is None:
            raise UserError(
                f"tokenizer {name!r} has no end-of-text token (looked for {', '.join(EOT_NAMES)}); "
                "add one of these as a special token"
            )
        self.eot_id = eot_id
        self._bytes = _byte_level_table(backend, vocab)

    @classmethod
    def from_json(cls, text: str, name: str = "tokenizer") -> HFTokenizer:
        """From the text of a tokenizer.json."""
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{name}: not a tokenizer.json that the tokenizers library reads: {error}") from error
        return cls(backend, name)

    def __reduce__(self):
        return HFTokenizer.from_json, (self.backend.to_str(), self.name)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64 arrays; uses all cores."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Text of token ids; special tokens give nothing."""
        if self._bytes is not None:
            return _join_bytes(self, ids, errors)
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes of a byte-level token; None for tokenizers of another kind."""
        if self._bytes is None:
            return None
        found = self._bytes.get(token_id)
        if found is None:
            raise ValueError(f"token id {token_id} is outside the vocabulary of {self.vocab_size}")
        return found

    def save(self, directory: str | Path) -> Path:
        """Write tokenizer.json."""
        path = Path(directory) / TOKENIZER_FILE
        write_text_whole(path, self.backend.to_str(pretty=True))
        return path

    def fingerprint(self) -> str:
        """Hex digest of the serialised tokenizer, without the template of special tokens that is never used."""
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


def _byte_level_table(backend: tokenizers.Tokenizer, vocab: dict[str, int]) -> dict[int, bytes] | None:
    """Bytes of every token of a byte-level tokenizer; None if the tokenizer is of another kind."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}
    if "ByteLevel" not in kinds or not kinds <= {"ByteLevel", "Fuse"}:
        return None
    added = backend.get_added_tokens_decoder()
    alphabet = byte_alphabet()
    table = {}
    for token, token_id in vocab.items():
        if token_id in added:
            table[token_id] = b"" if added[token_id].special else token.encode("utf-8")
        elif all(char in alphabet for char in token):
            table[token_id] = bytes(alphabet[char] for char in token)
        else:
            table[token_id] = token.encode("utf-8")
    return table


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies, to the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
