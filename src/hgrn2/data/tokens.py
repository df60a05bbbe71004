"""Memory-mapped token shards, read only, with O(1) access to any position.

A dataset is a directory: raw little-endian shards of equal length (the last may be shorter), `documents.bin`
(the position of every document's first token), `pieces.bin` (pairs: the position after a piece of text, and
the UTF-8 bytes of all text up to there) and `manifest.json`. A document is the end-of-text token followed by
its text, so the first token of a text is predicted from the end-of-text token, and the end of a document is
predicted as the next one's.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2.errors import UserError

FORMAT = "hgrn2-tokens"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
REMEDY = "prepare the data again (--rebuild)"

# reading a GiB takes about a second: below it, checksums are worth their time at every start
VERIFY_BELOW_BYTES = 1 << 30


class TokenDataset:
    """The tokens of many documents, one after the other. Made by `TokenDataset.open`.

    Attributes:
        directory: where the files are.
        manifest: the manifest as read.
        num_tokens: tokens in all, the end-of-text tokens included.
        num_documents: documents in all.
        num_text_bytes: UTF-8 bytes of the documents' text.
        num_unknown: tokens that stand for text the vocabulary lacks; 0 for sets of earlier versions.
        keeps_text: whether the text can be told from the tokens; True for sets of earlier versions.
        vocab_size: of the tokenizer.
        eot_id: the token that starts every document.
        document_starts: int64 [num_documents], position of every document's end-of-text token; memory-mapped.
        piece_ends: int64 [num_pieces], positions after each piece of text; every document ends at one.
        piece_bytes: int64 [num_pieces], UTF-8 bytes of all text up to each piece's end.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]):
        self.directory = directory
        self.manifest = manifest
        self.num_tokens: int = manifest["num_tokens"]
        self.num_documents: int = manifest["num_documents"]
        self.num_text_bytes: int = manifest["num_text_bytes"]
        self.num_unknown: int = manifest.get("num_unknown", 0)
        self.keeps_text: bool = manifest.get("keeps_text", True)
        self.vocab_size: int = manifest["vocab_size"]
        self.eot_id: int = manifest["eot_id"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shard_tokens: int = manifest["shard_tokens"]
        self._shards = [np.memmap(directory / s["file"], self.dtype, mode="r") for s in manifest["shards"]]
        self.document_starts: np.ndarray = np.memmap(directory / manifest["documents"]["file"], "<i8", mode="r")
        pieces = np.memmap(directory / manifest["pieces"]["file"], "<i8", mode="r").reshape(-1, 2)
        self.piece_ends, self.piece_bytes = pieces[:, 0], pieces[:, 1]

    @classmethod
    def open(cls, directory: str | Path, verify: bool | None = None) -> TokenDataset:
        """Open a dataset.

        Args:
            directory: holds manifest.json.
            verify: True reads every file and compares checksums, False compares sizes only; None (the
                default) means True for sets below 1 GiB.

        Raises:
            UserError: a file is missing, truncated or changed; the message names it, what was found and
                wanted.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, FORMAT, FORMAT_VERSION)
        try:
            files = [*manifest["shards"], manifest["documents"], manifest["pieces"]]
            if verify is None:
                verify = sum(entry["num_bytes"] for entry in files) < VERIFY_BELOW_BYTES
            for entry in files:
                _check_file(directory / entry["file"], entry["num_bytes"], entry["sha256"] if verify else None)
            return cls(directory, manifest)
        except (KeyError, TypeError) as error:
            raise UserError(f"{directory / MANIFEST_FILE}: bad or missing entry {error}; {REMEDY}") from error

    @property
    def fingerprint(self) -> str:
        """Hex digest of the tokens and the document starts."""
        parts = [*self.manifest["shards"], self.manifest["documents"]]
        return hashlib.sha256("".join(part["sha256"] for part in parts).encode()).hexdigest()

    def __len__(self) -> int:
        return self.num_tokens

    def __repr__(self) -> str:
        return (
            f"TokenDataset({str(self.directory)!r}, {self.num_tokens:,} tokens, "
            f"{self.num_documents:,} documents, {self.num_text_bytes:,} bytes of text)"
        )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """A copy of tokens [start, stop) as int64; the range may span shards."""
        out = np.empty(max(stop - start, 0), dtype=np.int64)
        self.copy_into(out, start)
        return out

    def copy_into(self, out: np.ndarray, start: int) -> None:
        """Fill a 1-D integer array with the tokens from position start on.

        Raises:
            IndexError: the range is outside the dataset.
        """
        if not 0 <= start <= start + len(out) <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + len(out)}) are outside the {self.num_tokens} there are")
        done = 0
        while done < len(out):
            shard, offset = divmod(start + done, self._shard_tokens)
            part = self._shards[shard][offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    def text_bytes(self, start: int, stop: int) -> int:
        """UTF-8 bytes of the text in tokens [start, stop); both must be 0 or the end of a piece or document.

        Raises:
            ValueError: a position lies within a piece, where bytes are not recorded.
        """
        return self._bytes_before(stop) - self._bytes_before(start)

    def _bytes_before(self, position: int) -> int:
        if position == 0:
            return 0
        index = int(np.searchsorted(self.piece_ends, position))
        if index == len(self.piece_ends) or self.piece_ends[index] != position:
            raise ValueError(f"position {position} is not the end of a piece of text")
        return int(self.piece_bytes[index])


def read_manifest(directory: Path, kind: str, version: int) -> dict[str, Any]:
    """Read and check manifest.json.

    Raises:
        UserError: it is missing, not JSON, of another kind or of another version.
    """
    path = directory / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {directory} is not prepared data") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged, not JSON ({error}); {REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != kind:
        raise UserError(f"{path}: not a manifest of format {kind!r}; is this the right directory?")
    if manifest.get("version") != version:
        raise UserError(f"{path}: format version {manifest.get('version')}, this release reads {version}; {REMEDY}")
    return manifest


def _check_file(path: Path, num_bytes: int, sha256: str | None) -> None:
    try:
        found_bytes = path.stat().st_size
        if found_bytes != num_bytes:
            raise UserError(f"{path}: {found_bytes:,} bytes, the manifest says {num_bytes:,}; {REMEDY}")
        if sha256 is None:
            return
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    if found != sha256:
        raise UserError(
            f"{path}: content changed (sha256 {found[:12]}..., the manifest says {sha256[:12]}...); {REMEDY}"
        )
