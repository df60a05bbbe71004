"""Text to token ids and back: bytes without any file, or any Hugging Face tokenizer.

Every tokenizer here has an end-of-text token. It is the document separator, the start symbol, and never
comes out of `encode`: control tokens written in a text are encoded as the plain characters they are.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hgrn2.data.hub import hub_reachable
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
_BYTES_MARKER = {"format": "hgrn2-tokenizer", "name": "bytes"}
_BPE_REQUEST = re.compile(r"bpe:(\d+)")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


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
        write_text_whole(path, json.dumps(_BYTES_MARKER, indent=2) + "\n")
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
        """Hex digest of the serialised tokenizer."""
        return hashlib.sha256(self.backend.to_str().encode("utf-8")).hexdigest()


class TextStream:
    """Decodes token by token and hands out complete characters only.

    Example:
        >>> stream = TextStream(ByteTokenizer())
        >>> [stream.push(i) for i in "é".encode()]
        ['', 'é']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # for tokens whose text depends on their neighbours: what was handed out last, and what still waits
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; often empty."""
        try:
            data = self._tokenizer.token_bytes(int(token_id))
        except ValueError:
            # an untrained model with a padded vocabulary may say anything
            data = "\ufffd".encode()
        if data is not None:
            return self._utf8.decode(data)
        self._waiting.append(int(token_id))
        text = self._fresh_text()
        if text.endswith("\ufffd"):
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        text = self._fresh_text() + self._utf8.decode(b"", final=True)
        self._context, self._waiting = [], []
        self._utf8.reset()
        return text

    def _fresh_text(self) -> str:
        if not self._waiting:
            return ""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting)[len(before) :]


def bpe_request(spec: object) -> int | None:
    """The vocabulary size in "bpe:4096", a tokenizer still to be trained; None for anything else."""
    match = _BPE_REQUEST.fullmatch(spec) if isinstance(spec, str) else None
    return int(match.group(1)) if match else None


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: the training texts, iterated once.
        vocab_size: wanted number of tokens, the 256 bytes and "<|endoftext|>" (id 0) included; a small corpus
            may give fewer.

    Raises:
        UserError: vocab_size is below 257 (the bytes and the end of text).
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small for a byte-level BPE; wanted at least 257")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT_NAMES[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return HFTokenizer(backend, f"bpe:{vocab_size}")


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        spec: "bytes", a tokenizer.json, a directory that holds one (or was written by `Tokenizer.save`), or
            the name of a model on the Hugging Face Hub, which is looked up in the local cache when offline.

    Raises:
        UserError: nothing usable there; the message says what was found.

    Example:
        >>> load_tokenizer("bytes").vocab_size
        257
    """
    if spec == "bytes":
        return ByteTokenizer()
    if bpe_request(spec) is not None:
        raise UserError(f"tokenizer {spec!r} is still to be trained; prepare data with it, or use train_bpe")
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_directory(path)
    if path.is_file():
        return _load_file(path)
    looks_like_path = isinstance(spec, Path) or path.suffix in {".json", ".model"} or str(spec)[:1] in "./~"
    if looks_like_path or not _HUB_NAME.fullmatch(str(spec)):
        raise UserError(f"tokenizer {str(spec)!r}: no such file or directory")
    return _load_hub(str(spec))


def _load_directory(path: Path) -> Tokenizer:
    for name in (TOKENIZER_FILE, BYTES_FILE):
        if (path / name).is_file():
            return _load_file(path / name)
    sentencepiece = sorted(path.glob("*.model"))
    if sentencepiece:
        raise UserError(_sentencepiece_message(sentencepiece[0]))
    raise UserError(f"tokenizer {str(path)!r}: the directory holds no {TOKENIZER_FILE}; give one that does, or 'bytes'")


def _load_file(path: Path) -> Tokenizer:
    if path.suffix == ".model":
        raise UserError(_sentencepiece_message(path))
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise UserError(f"tokenizer {str(path)!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"tokenizer {str(path)!r} is not JSON: {error}") from error
    if content == _BYTES_MARKER:
        return ByteTokenizer()
    return HFTokenizer.from_json(text, str(path))


def _load_hub(name: str) -> Tokenizer:
    from huggingface_hub import hf_hub_download

    online = hub_reachable()
    try:
        path = hf_hub_download(name, TOKENIZER_FILE, local_files_only=not online)
    except Exception as error:  # connection, permission and missing-file errors come from several libraries
        if not online:
            raise UserError(
                f"tokenizer {name!r}: no such file, not in the local cache, and the Hugging Face Hub cannot "
                "be reached (offline); connect, or give a tokenizer.json or 'bytes'"
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tokenizer {name!r}: no such file, and no {TOKENIZER_FILE} from the Hugging Face Hub: {reason}"
        ) from error
    return HFTokenizer.from_json(Path(path).read_text(encoding="utf-8"), name)


def _sentencepiece_message(path: Path) -> str:
    return (
        f"tokenizer {str(path)!r} is a SentencePiece model, which tokenizers cannot read; convert "
        "it to tokenizer.json with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    )


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
    alphabet = _byte_alphabet()
    table = {}
    for token, token_id in vocab.items():
        if token_id in added:
            table[token_id] = b"" if added[token_id].special else token.encode("utf-8")
        elif all(char in alphabet for char in token):
            table[token_id] = bytes(alphabet[char] for char in token)
        else:
            table[token_id] = token.encode("utf-8")
    return table


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies, to the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}
