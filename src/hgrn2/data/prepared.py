"""A prepared corpus on disk: training and validation tokens with their tokenizer, checked and opened as one set."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2.data.find_tokenizer import load_tokenizer
from hgrn2.data.split import TRAIN, VALIDATION
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.data.tokens import MANIFEST_FILE, REMEDY, TokenDataset, read_manifest
from hgrn2.errors import UserError
from hgrn2.quantities import plural

FORMAT = "hgrn2-prepared"
FORMAT_VERSION = 1
_KEYS = {"format", "version", "inputs", "settings", "skipped", "copies", "fingerprints"}

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))

# retries while another process replaces the set, which is missing only between two renames
_ATTEMPTS = 10
_PAUSE_S = 0.01


@dataclass(frozen=True)
class PreparedData:
    """A prepared corpus.

    Attributes:
        directory: folder with manifest.json, the tokenizer, train/ and validation/.
        train: the training tokens.
        validation: the held-out tokens.
        tokenizer: the tokenizer that made them.
        manifest: inputs, settings and counts of skipped files.
        reused: True if the set existed and its inputs had not changed.
    """

    directory: Path
    train: TokenDataset
    validation: TokenDataset
    tokenizer: Tokenizer
    manifest: dict[str, Any]
    reused: bool = True

    def __repr__(self) -> str:
        """Return one line with the directory and the summary."""
        return f"PreparedData({str(self.directory)!r}: {self.summary()})"

    @classmethod
    def open(cls, directory: str | Path, verify: bool | None = None, *, reused: bool = True) -> PreparedData:
        """Open a directory made by `prepare`; its inputs need not exist any more.

        Args:
            directory: the prepared set.
            verify: True reads every file and compares checksums, False compares sizes only, None compares checksums
                of sets below 1 GiB.
            reused: value of the attribute.

        Raises:
            UserError: the directory is not a prepared set, or it is damaged.
        """
        directory = Path(directory)
        for _ in range(_ATTEMPTS - 1):
            before = _identity(directory)
            try:
                opened = cls._open(directory, verify, reused)
            except (UserError, OSError):
                if before is not None and _identity(directory) == before:
                    raise
            else:
                if _identity(directory) == before:
                    return opened
            # another process is replacing the set: for a moment it is missing, or parts of both are read
            time.sleep(_PAUSE_S)
        return cls._open(directory, verify, reused)

    @classmethod
    def _open(cls, directory: Path, verify: bool | None, reused: bool) -> PreparedData:
        manifest = read_set_manifest(directory)
        train = TokenDataset.open(directory / TRAIN, verify)
        validation = TokenDataset.open(directory / VALIDATION, verify)
        tokenizer = load_tokenizer(directory)
        for side in (train, validation):
            if tokenizer.fingerprint() != side.manifest["tokenizer_fingerprint"]:
                raise UserError(
                    f"{directory}: its tokenizer is not the one the {side.directory.name} tokens were made with; "
                    f"{REMEDY}",
                    "mismatch",
                )
            if side.vocab_size != tokenizer.vocab_size or side.eot_id != train.eot_id:
                raise UserError(
                    f"{side.directory}: vocab_size {side.vocab_size} or eot_id {side.eot_id} is not that of the "
                    f"tokenizer ({tokenizer.vocab_size}) or of the training tokens ({train.eot_id}); {REMEDY}",
                    "mismatch",
                )
        # older sets have none
        made = manifest.get("fingerprints", {})
        if made and made != {TRAIN: train.fingerprint, VALIDATION: validation.fingerprint}:
            raise UserError(
                f"{directory}: training and validation tokens were not prepared together; {REMEDY}", "mismatch"
            )
        tokenizer.name = train.manifest["tokenizer"]
        return cls(directory, train, validation, tokenizer, manifest, reused)

    def summary(self) -> str:
        """Return one line for people: sizes, skipped files with the reasons, and losses of the tokenizer."""
        line = (
            f"{_contents(self.train, 'training')}, {_contents(self.validation, 'validation')}, "
            f"tokenizer {self.tokenizer.name} with {self.tokenizer.vocab_size:,} tokens"
        )
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in self.manifest["skipped"].items())
        line += f"; skipped {skipped}" if skipped else ""
        return line + "".join(f"; {note}" for note in self._losses())

    def _losses(self) -> Iterator[str]:
        """Yield a note for each kind of text that the tokens lost."""
        num_unknown = self.train.num_unknown + self.validation.num_unknown
        if num_unknown:
            yield f"{num_unknown:,} tokens stand for text that the tokenizer does not know"
        if not self.validation.keeps_text:
            yield "the tokenizer does not keep the whole text, so bits per byte are not available"


def read_set_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a prepared set.

    Raises:
        UserError: the manifest is missing, damaged, or of another format.
    """
    manifest = read_manifest(directory, FORMAT, FORMAT_VERSION, _KEYS)
    for key in ("inputs", "settings", "skipped"):
        if not isinstance(manifest.get(key), dict):
            raise UserError(f"{directory / MANIFEST_FILE}: bad or missing entry {key!r}; {REMEDY}", "damaged")
    return manifest


def _contents(dataset: TokenDataset, what: str) -> str:
    num_bytes, count = dataset.num_text_bytes, dataset.num_documents
    unit, factor = next((unit, factor) for unit, factor in _UNITS if num_bytes >= factor or factor == 1)
    size = f"{num_bytes / factor:,.1f} {unit}" if factor > 1 else plural(num_bytes, "byte")
    return f"{dataset.num_tokens:,} {what} tokens ({plural(count, 'document')}, {size})"


def _identity(directory: Path) -> tuple[int, int, int] | None:
    """Return a value that changes when the folder is replaced; None if the folder is missing."""
    try:
        found = directory.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def is_prepared(directory: str | Path) -> bool:
    """Return whether a directory was made by `prepare`; damage is only found when the set is opened."""
    manifest = Path(directory) / MANIFEST_FILE
    return manifest.is_file() and (Path(directory) / TRAIN / MANIFEST_FILE).is_file()
