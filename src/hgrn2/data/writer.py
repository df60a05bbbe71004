"""Write the directory of a TokenDataset."""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2.data.encode import EncodedPiece
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.data.tokens import FORMAT, FORMAT_VERSION, MANIFEST_FILE, token_dtype
from hgrn2.storage.json_files import with_digest

DEFAULT_SHARD_TOKENS = 100_000_000


class TokenWriter:
    """Append documents piece by piece; `close` writes the manifest.

    Args:
        directory: the directory to create; must not exist.
        tokenizer: the tokenizer that makes the tokens.
        shard_tokens: tokens in every shard but the last.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_tokens: int = DEFAULT_SHARD_TOKENS):
        directory.mkdir()
        self.directory = directory
        self.num_tokens = 0
        self.num_text_bytes = 0
        self._num_unknown = 0
        self._keeps_text = True
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eot = np.array([tokenizer.eot_id], dtype=self._dtype)
        self._shard_tokens = shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file = None
        self._document_starts = array("q")
        self._pieces = array("q")

    @property
    def num_documents(self) -> int:
        """Number of documents started so far."""
        return len(self._document_starts)

    def add(self, piece: EncodedPiece, starts_document: bool) -> None:
        """Append a piece of text that starts a new document or continues the last one."""
        if starts_document:
            self._document_starts.append(self.num_tokens)
            self._append(self._eot)
        self._append(piece.tokens)
        self.num_text_bytes += piece.num_text_bytes
        self._num_unknown += piece.num_unknown
        self._keeps_text &= piece.keeps_text
        self._pieces.extend((self.num_tokens, self.num_text_bytes))

    def close(self) -> dict[str, Any]:
        """Write the last shard, the index files and the manifest; return the manifest."""
        if self._file is not None:
            self._end_shard()
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "tokenizer": self._tokenizer.name,
            "tokenizer_fingerprint": self._tokenizer.fingerprint(),
            "vocab_size": self._tokenizer.vocab_size,
            "eot_id": self._tokenizer.eot_id,
            "dtype": self._dtype.name,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_text_bytes": self.num_text_bytes,
            "num_unknown": self._num_unknown,
            "keeps_text": self._keeps_text and not self._num_unknown,
            "shard_tokens": self._shard_tokens,
            "shards": self._shards,
            "documents": self._write_integers("documents.bin", self._document_starts),
            "pieces": self._write_integers("pieces.bin", self._pieces),
        }
        text = json.dumps(with_digest(manifest), indent=1) + "\n"
        (self.directory / MANIFEST_FILE).write_text(text, encoding="utf-8")
        return manifest

    def abandon(self) -> None:
        """Close the open file without finishing the dataset; the directory is unusable afterwards."""
        if self._file is not None:
            self._file.close()

    def _append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self._file is None:
                self._file = (self.directory / f"tokens-{len(self._shards):05d}.bin").open("wb")
                self._sha256 = hashlib.sha256()
                self._shard_size = 0
            part, tokens = np.split(tokens, [self._shard_tokens - self._shard_size])
            data = part.tobytes()
            self._file.write(data)
            self._sha256.update(data)
            self._shard_size += len(part)
            self.num_tokens += len(part)
            if self._shard_size == self._shard_tokens:
                self._end_shard()

    def _end_shard(self) -> None:
        assert self._file is not None
        self._file.close()
        self._shards.append(
            {
                "file": Path(self._file.name).name,
                "num_tokens": self._shard_size,
                "num_bytes": self._shard_size * self._dtype.itemsize,
                "sha256": self._sha256.hexdigest(),
            }
        )
        self._file = None

    def _write_integers(self, name: str, values: array) -> dict[str, Any]:
        data = np.frombuffer(values, dtype=np.int64).astype("<i8").tobytes()
        (self.directory / name).write_bytes(data)
        return {"file": name, "num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
