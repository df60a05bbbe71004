"""Memory-mapped, read-only token shards with O(1) access to any position.

A dataset is a directory of raw little-endian shards of equal length (the last may be shorter), `documents.bin` (the
position of the first token of every document), `pieces.bin` (pairs: the position after a piece of text, and the UTF-8
bytes of all text up to there) and `manifest.json`. A document is the end-of-text token followed by its text. So the
first token of a text is predicted from the end-of-text token, and the last one predicts the end-of-text token of the
next document.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.storage.hashed import sha256_of
from hgrn2.storage.json_files import DIGEST_KEY, check_digest, read_json_object

FORMAT = "hgrn2-tokens"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
REMEDY = "prepare the data again (--rebuild)"

_KEYS = {
    "format", "version", "tokenizer", "tokenizer_fingerprint", "vocab_size", "eot_id", "dtype", "num_tokens",
    "num_documents", "num_text_bytes", "num_unknown", "keeps_text", "shard_tokens", "shards", "documents", "pieces",
}  # fmt: skip

# reading a GiB takes about a second; smaller sets are verified every time they are opened
VERIFY_BELOW_BYTES = 1 << 30


class TokenDataset:
    """The concatenated tokens of many documents. Open one with `TokenDataset.open`.

    Attributes:
        directory: the folder of the files.
        manifest: the content of manifest.json.
        num_tokens: number of tokens, including the end-of-text tokens.
        num_documents: number of documents.
        num_text_bytes: UTF-8 bytes of the documents' text.
        num_unknown: number of unknown tokens, which replace text the vocabulary lacks; 0 for sets of earlier versions.
        keeps_text: whether decoding restores the text; True for sets of earlier versions.
        vocab_size: vocabulary of the tokenizer.
        eot_id: the end-of-text token, which starts every document.
        document_starts: int64 [num_documents], position of the first token of every document; memory-mapped.
        piece_ends: int64 [num_pieces], position after each piece of text; every document ends at one.
        piece_bytes: int64 [num_pieces], UTF-8 bytes of all text up to the end of each piece.
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
        self._shards = [_Shard(directory / s["file"], self.dtype) for s in manifest["shards"]]
        self.document_starts: np.ndarray = np.memmap(directory / manifest["documents"]["file"], "<i8", mode="r")
        pieces = np.memmap(directory / manifest["pieces"]["file"], "<i8", mode="r").reshape(-1, 2)
        self.piece_ends, self.piece_bytes = pieces[:, 0], pieces[:, 1]

    @classmethod
    def open(cls, directory: str | Path, verify: bool | None = None) -> TokenDataset:
        """Open a dataset.

        Args:
            directory: the folder with manifest.json.
            verify: True reads every file and compares checksums, False compares sizes only; None means True for sets
                below 1 GiB.

        Raises:
            UserError: a file is missing, truncated or changed; the message names it, and what was found and wanted.
        """
        directory = Path(directory)
        manifest = read_manifest(directory, FORMAT, FORMAT_VERSION, _KEYS)
        if fault := manifest_fault(manifest):
            raise UserError(f"{directory / MANIFEST_FILE}: {fault}; {REMEDY}", "damaged")
        files = [*manifest["shards"], manifest["documents"], manifest["pieces"]]
        if verify is None:
            verify = sum(entry["num_bytes"] for entry in files) < VERIFY_BELOW_BYTES
        for entry in files:
            _check_file(directory / entry["file"], entry["num_bytes"], entry["sha256"] if verify else None)
        dataset = cls(directory, manifest)
        if fault := dataset._index_fault(whole=verify):
            raise UserError(f"{directory}: {fault}; {REMEDY}", "damaged")
        return dataset

    def _index_fault(self, whole: bool) -> str | None:
        """Return how the tokens contradict the manifest; None if they do not.

        Args:
            whole: check every document; otherwise only the first and the last.
        """
        starts = self.document_starts if whole else self.document_starts[np.unique([0, self.num_documents - 1])]
        ends, num_bytes = (
            (self.piece_ends, self.piece_bytes) if whole else (self.piece_ends[-1:], self.piece_bytes[-1:])
        )
        if starts[0] != 0 or starts[-1] >= self.num_tokens or (np.diff(starts) <= 0).any():
            return "documents.bin does not hold the starts of documents in order"
        if ends[-1] != self.num_tokens or num_bytes[-1] != self.num_text_bytes:
            return "num_tokens or num_text_bytes is not what pieces.bin says"
        if ends[0] <= 0 or num_bytes[0] < 0 or (np.diff(ends) < 0).any() or (np.diff(num_bytes) < 0).any():
            return "pieces.bin does not hold the ends of pieces in order"
        for shard in np.unique(starts // self._shard_tokens):
            inside = starts[starts // self._shard_tokens == shard] - shard * self._shard_tokens
            if (self._shards[shard].read(0, self._shard_tokens)[inside] != self.eot_id).any():
                return f"eot_id is {self.eot_id}, but documents start with another token"
        return None

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
        """Return a copy of tokens [start, stop) as int64; the range may span shards."""
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
            part = self._shards[shard].read(offset, offset + len(out) - done)
            out[done : done + len(part)] = part
            done += len(part)

    def text_bytes(self, start: int, stop: int) -> int:
        """Return the UTF-8 bytes of the text in tokens [start, stop); both must be 0 or the end of a piece.

        Raises:
            ValueError: a position is inside a piece, where the byte count is not recorded.
        """
        return self._bytes_before(stop) - self._bytes_before(start)

    def document_tokens(self, index: int, most: int | None = None) -> np.ndarray:
        """Read the tokens of a document, without the end-of-text token it starts with.

        Args:
            index: index of the document.
            most: maximum number of tokens to read; None reads all.
        """
        start = int(self.document_starts[index]) + 1
        is_last = index + 1 == self.num_documents
        stop = self.num_tokens if is_last else int(self.document_starts[index + 1])
        return self.tokens(start, stop if most is None else min(stop, start + most))

    def _bytes_before(self, position: int) -> int:
        if position == 0:
            return 0
        index = int(np.searchsorted(self.piece_ends, position))
        if index == len(self.piece_ends) or self.piece_ends[index] != position:
            raise ValueError(f"position {position} is not the end of a piece of text")
        return int(self.piece_bytes[index])


class _Shard:
    """A memory-mapped file of tokens."""

    def __init__(self, path: Path, dtype: np.dtype):
        self._path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._tokens = np.frombuffer(self._map, dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        # reading mapped pages beyond the end of the file kills the process; this check is one system call
        if self._map.size() < self._tokens.nbytes:
            raise UserError(
                f"{self._path}: was cut short while it was being read; {REMEDY}, then resume the run", "damaged"
            )
        return self._tokens[start:stop]


def read_manifest(directory: Path, kind: str, version: int, known: Set[str]) -> dict[str, Any]:
    """Read and check manifest.json.

    Args:
        directory: the folder that holds it.
        kind: the format it must name.
        version: the version it must name.
        known: all keys of that format.

    Raises:
        UserError: the file is missing, not JSON, of another format or version, or does not match its digest.
    """
    path = directory / MANIFEST_FILE
    if not path.exists():
        raise UserError(f"{path}: no such file; {directory} is not prepared data", "not-found")
    found = read_json_object(path, REMEDY)
    if found.get("format") != kind:
        raise UserError(f"{path}: not a manifest of format {kind!r}; is this the right directory?", "unreadable")
    if found.get("version") != version:
        raise UserError(
            f"{path}: format version {found.get('version')}, this release reads {version}; {REMEDY}", "version"
        )
    manifest = check_digest(found, path, REMEDY)
    # older sets have no digest: an unknown key there means damage
    if DIGEST_KEY not in found and (unknown := sorted(manifest.keys() - known)):
        raise UserError(f"{path}: {unknown_key_message('manifest', unknown[0], known)}; {REMEDY}", "damaged")
    return manifest


def manifest_fault(manifest: dict[str, Any]) -> str | None:
    """Return what is wrong with the manifest of a token dataset, or None; checks the fields against each other too."""
    for key in ("num_tokens", "num_documents", "num_text_bytes", "vocab_size", "eot_id", "shard_tokens"):
        least = 0 if key in ("eot_id", "num_text_bytes") else 1
        if fault := _count_fault(manifest, key, least):
            return fault
    if fault := _count_fault({"num_unknown": 0, **manifest}, "num_unknown", 0):
        return fault
    if not isinstance(manifest.get("keeps_text", True), bool):
        return "bad or missing entry 'keeps_text'"
    for key in ("tokenizer", "tokenizer_fingerprint", "dtype"):
        if not isinstance(manifest.get(key), str):
            return f"bad or missing entry {key!r}"
    num_tokens, vocab_size, shard_tokens = manifest["num_tokens"], manifest["vocab_size"], manifest["shard_tokens"]
    dtype = token_dtype(vocab_size)
    if manifest["dtype"] != dtype.name:
        return f"dtype is {manifest['dtype']!r}, wanted {dtype.name!r} for a vocabulary of {vocab_size:,}"
    if manifest["eot_id"] >= vocab_size:
        return f"eot_id is {manifest['eot_id']}, but the vocabulary has {vocab_size:,} tokens"
    shards = manifest.get("shards")
    if not isinstance(shards, list):
        return "bad or missing entry 'shards'"
    entries = {f"shard {i}": entry for i, entry in enumerate(shards)}
    for name, entry in (entries | {key: manifest.get(key) for key in ("documents", "pieces")}).items():
        if fault := _entry_fault(entry):
            return f"{name}: {fault}"
    files = [entry["file"] for entry in (*shards, manifest["documents"], manifest["pieces"])]
    if len(set(files)) < len(files):
        return "a file is named more than once"
    if len(shards) != -(-num_tokens // shard_tokens):
        return f"{len(shards)} shards of {shard_tokens:,} tokens do not hold num_tokens = {num_tokens:,}"
    for i, shard in enumerate(shards):
        wanted = min(shard_tokens, num_tokens - i * shard_tokens)
        if shard.get("num_tokens") != wanted or shard["num_bytes"] != wanted * dtype.itemsize:
            return f"shard {i}: wanted {wanted:,} tokens of {dtype.itemsize} bytes"
    if manifest["documents"]["num_bytes"] != 8 * manifest["num_documents"]:
        return f"documents.bin does not hold num_documents = {manifest['num_documents']:,}"
    pieces = manifest["pieces"]["num_bytes"]
    return None if pieces and pieces % 16 == 0 else "pieces.bin does not hold pairs"


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest little-endian dtype for the token ids: uint16 up to 65536 tokens, otherwise uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def _count_fault(values: dict[str, Any], key: str, least: int) -> str | None:
    value = values.get(key)
    # 2**56 is more than any disk holds
    if type(value) is int and least <= value < 2**56:
        return None
    return f"bad or missing entry {key!r}"


def _entry_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return "bad or missing entry"
    name = entry.get("file")
    # a manifest may only name files in its own folder
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        return f"file is {name!r}, wanted the name of a file beside the manifest"
    if not isinstance(entry.get("sha256"), str):
        return "bad or missing entry 'sha256'"
    return _count_fault(entry, "num_bytes", 0)


def _check_file(path: Path, num_bytes: int, sha256: str | None) -> None:
    try:
        found_bytes = path.stat().st_size
        if found_bytes != num_bytes:
            raise UserError(f"{path}: {found_bytes:,} bytes, the manifest says {num_bytes:,}; {REMEDY}", "damaged")
        if sha256 is None:
            return
        found = sha256_of(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}", "unreadable") from error
    if found != sha256:
        raise UserError(
            f"{path}: content changed (sha256 {found[:12]}..., the manifest says {sha256[:12]}...); {REMEDY}", "damaged"
        )
