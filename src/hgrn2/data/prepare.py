"""Tokenise a corpus once into training and validation token datasets, which later runs memory-map."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgrn2.data.copies import KeySet, with_key
from hgrn2.data.documents import holds_json_lines
from hgrn2.data.encode import encode_pieces, num_cores
from hgrn2.data.find_tokenizer import bpe_request, load_tokenizer, train_bpe
from hgrn2.data.pieces import Piece, cut_document
from hgrn2.data.prepared import FORMAT, FORMAT_VERSION, PreparedData, read_set_manifest
from hgrn2.data.progress import Bar, progress_bar
from hgrn2.data.sources import STDLIB, Corpus, open_corpus
from hgrn2.data.split import TRAIN, VALIDATION, Split
from hgrn2.data.text import NotText
from hgrn2.data.tokenizer import ByteTokenizer, Tokenizer
from hgrn2.data.tokens import MANIFEST_FILE, TokenDataset, token_dtype
from hgrn2.data.writer import DEFAULT_SHARD_TOKENS, TokenWriter
from hgrn2.errors import UserError, visible
from hgrn2.quantities import plural
from hgrn2.storage.json_files import with_digest
from hgrn2.storage.staging import Discard, staged_directory

BPE_SAMPLE_BYTES = 50_000_000

# number of copies named in a warning
_NAMES_SHOWN = 5

# the tokenizers library uses all cores itself; several processes scale better but take a second to start
_SERIAL_BELOW_BYTES = 32_000_000
_SERIAL_BELOW_CORES = 5

Specs = str | Path | Sequence[str | Path]


def prepare(
    sources: Specs = STDLIB,
    tokenizer: Tokenizer | str | Path = "bytes",
    out_dir: str | Path = "data",
    *,
    validation: Specs = (),
    validation_fraction: float = 0.05,
    text_field: str = "text",
    seed: int = 0,
    num_workers: int | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    progress: bool | None = None,
    rebuild: bool = False,
    check_tokenizer: Callable[[Tokenizer], None] | None = None,
) -> PreparedData:
    """Tokenise a corpus into out_dir, or reuse the set there if neither inputs nor settings have changed.

    The tokens do not depend on the number of workers, or on the order or location of the sources.

    Args:
        sources: files, folders, globs, Hub datasets or "stdlib", as for `open_corpus`.
        tokenizer: a tokenizer, anything `load_tokenizer` takes, or "bpe:4096" to train a byte-level BPE of that size
            on the first 50 MB of the training documents.
        out_dir: the folder of the set, replaced as a whole once the new set is complete. It must not hold anything
            but a prepared set.
        validation: sources of validation data; files among them are excluded from training. Without any, whole
            documents are held out, chosen by a hash of their names.
        validation_fraction: fraction of documents to hold out, in (0, 1); at least one document, or the last part of
            a single document.
        text_field: key or column of the text in .jsonl, .parquet and Hub datasets.
        seed: seed of the choice of documents to hold out.
        num_workers: number of processes; None means one per core, or this process alone for a small corpus, the byte
            tokenizer or few cores.
        shard_tokens: tokens per shard.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        rebuild: prepare even if nothing has changed.
        check_tokenizer: called with the tokenizer as soon as it is known, before the corpus is tokenised. If it raises,
            nothing is kept and the error is passed on.

    Raises:
        UserError: a source cannot be used, nothing is left to hold out, or out_dir cannot be written.
    """
    if not 0 < validation_fraction < 1:
        raise UserError(f"validation_fraction is {validation_fraction}, wanted more than 0 and less than 1")
    if shard_tokens < 1 or (num_workers is not None and num_workers < 1):
        raise UserError(f"shard_tokens ({shard_tokens}) and num_workers ({num_workers}) must be at least 1")
    corpus = open_corpus(sources, text_field)
    held_out = open_corpus(validation, text_field) if isinstance(validation, (str, Path)) or validation else None
    if held_out is not None:
        corpus = corpus.without(held_out)
        if not corpus.sources:
            raise UserError(
                "all training data is also named as validation data; name other files for one of them", "contradiction"
            )
    vocab_size = bpe_request(tokenizer)
    if isinstance(tokenizer, (str, Path)) and vocab_size is None:
        tokenizer = load_tokenizer(tokenizer)
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = str(tokenizer)
    check = check_tokenizer or (lambda _: None)
    if vocab_size is not None:
        # the smallest byte-level BPE there can be: if even this one fails the check, fail before training
        check(train_bpe((), 257))
    elif isinstance(tokenizer, Tokenizer):
        check(tokenizer)
    settings = {
        "tokenizer": tokenizer.fingerprint() if isinstance(tokenizer, Tokenizer) else str(tokenizer),
        "bpe_sample_bytes": BPE_SAMPLE_BYTES if vocab_size else None,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "shard_tokens": shard_tokens,
    }
    inputs = _describe_inputs(corpus, held_out)
    # if out_dir is a link, replace the folder it points to
    target = Path(os.path.realpath(Path(out_dir).expanduser()))
    if not rebuild and _is_current(target, inputs, settings):
        found = PreparedData.open(target)
        # otherwise another process has replaced it since the check
        if _fits(found.manifest, inputs, settings):
            _warn_of_copies(found)
            return found
    _check_replaceable(target)
    if num_workers is None:
        cores = num_cores()
        serial = isinstance(tokenizer, ByteTokenizer) or cores < _SERIAL_BELOW_CORES or _is_small(corpus)
        num_workers = 1 if serial else cores
    reused = True
    with staged_directory(target) as stage:
        # another process may have made the set while this one waited for the lock
        if not rebuild and _is_current(target, inputs, settings):
            raise Discard
        reused = False
        job = _Job(stage, corpus, held_out, tokenizer, check, validation_fraction, shard_tokens, num_workers, progress)
        job.run(_first_split(corpus, held_out, validation_fraction, seed)).save(stage)
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "inputs": inputs,
            "settings": settings,
            "skipped": _skipped(corpus, held_out),
            "copies": {"num_documents": len(job.copies), "some": job.copies[:_NAMES_SHOWN]},
            "fingerprints": {
                side: TokenDataset.open(stage / side, verify=False).fingerprint for side in (TRAIN, VALIDATION)
            },
        }
        (stage / MANIFEST_FILE).write_text(json.dumps(with_digest(manifest), indent=1) + "\n", encoding="utf-8")
    # a set written a moment ago needs no checksum
    found = PreparedData.open(target, verify=None if reused else False, reused=reused)
    _warn_of_copies(found)
    if not _fits(found.manifest, inputs, settings):
        raise UserError(
            f"{target}: another process has put other data there meanwhile; name another directory", "in-use"
        )
    return found


@dataclass(frozen=True)
class _Job:
    """One preparation: its inputs, its target and its settings."""

    stage: Path
    corpus: Corpus
    held_out: Corpus | None
    tokenizer: Tokenizer | str
    check_tokenizer: Callable[[Tokenizer], None]
    validation_fraction: float
    shard_tokens: int
    num_workers: int
    progress: bool | None
    # names of validation documents whose text is also in the training data
    copies: list[str] = field(default_factory=list)

    def run(self, split: Split) -> Tokenizer:
        """Write both datasets, again with a better split if one came out empty; return the tokenizer."""
        while True:
            tokenizer = self.tokenizer if isinstance(self.tokenizer, Tokenizer) else self._train_tokenizer(split)
            writers = {}
            try:
                for side in (TRAIN, VALIDATION):
                    shutil.rmtree(self.stage / side, ignore_errors=True)
                    writers[side] = TokenWriter(self.stage / side, tokenizer, self.shard_tokens)
                self._write(split, tokenizer, writers)
                next_split = self._better_split(split, writers)
                if next_split is None:
                    for writer in writers.values():
                        writer.close()
                    return tokenizer
                split = next_split
            finally:
                for writer in writers.values():
                    writer.abandon()

    def _write(self, split: Split, tokenizer: Tokenizer, writers: dict[str, TokenWriter]) -> None:
        dtype = token_dtype(tokenizer.vocab_size)
        corpora = [self.corpus] + ([self.held_out] if self.held_out is not None else [])
        sizes = [corpus.num_bytes for corpus in corpora]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        pieces = self._tagged_pieces(split, tokenizer)
        encoded = encode_pieces(pieces, tokenizer, dtype, self.num_workers)
        # close the generator on an error, so that no worker outlives this call
        with progress_bar("preparing", total, self.progress) as bar, closing(encoded):
            for (side, starts), piece in encoded:
                writers[side].add(piece, starts)
                bar.advance(piece.num_text_bytes)

    def _tagged_pieces(self, split: Split, tokenizer: Tokenizer) -> Iterator[tuple[tuple[str, bool], Piece]]:
        """Yield every piece with its side and whether it starts a document."""
        trained = KeySet()
        for side, document, is_first in split.assign(self.corpus.documents()):
            if is_first:
                split.observe(document.name)
            if is_first and self.held_out is not None:
                key, document = with_key(document)
                trained.add(key)
            starts = True
            for piece in cut_document(tokenizer, document.pieces):
                yield (side, starts), piece
                starts = False
        self.copies.clear()
        for document in self.held_out.documents() if self.held_out is not None else ():
            key, document = with_key(document)
            if key in trained:
                self.copies.append(document.name)
            starts = True
            for piece in cut_document(tokenizer, document.pieces):
                yield (VALIDATION, starts), piece
                starts = False

    def _better_split(self, split: Split, writers: dict[str, TokenWriter]) -> Split | None:
        """Return None if both sides have documents, else the split to try next; UserError if there is none."""
        train, validation = writers[TRAIN], writers[VALIDATION]
        if train.num_documents and validation.num_documents:
            return None
        if self.held_out is not None:
            empty = self.corpus if not train.num_documents else self.held_out
            raise UserError(_nothing_left("training" if empty is self.corpus else "validation", empty), "not-found")
        num_text_bytes = train.num_text_bytes + validation.num_text_bytes
        if num_text_bytes == 0:
            raise UserError(_nothing_left("training", self.corpus), "not-found")
        if split.num_seen > 1:
            return split.better()
        num_documents = train.num_documents + validation.num_documents
        if split.head_bytes is None and num_documents > 1:
            raise UserError(
                f"all {num_documents:,} documents hold the same text, so none can be held out; give more data, or "
                "validation data of its own"
            )
        if split.head_bytes is None:
            return Split(split.seed, 0, int(num_text_bytes * (1 - self.validation_fraction)))
        raise UserError(
            f"the only document has {num_text_bytes} bytes of text, too few to hold some out for validation; "
            "give more data, or validation data of its own"
        )

    def _train_tokenizer(self, split: Split) -> Tokenizer:
        vocab_size = bpe_request(self.tokenizer)
        assert vocab_size is not None, f"not a request for a tokenizer: {self.tokenizer!r}"
        total = self.corpus.num_bytes and min(self.corpus.num_bytes, BPE_SAMPLE_BYTES)
        with progress_bar("reading text for the tokenizer", total, self.progress) as bar:
            tokenizer = train_bpe(self._training_sample(split, bar), vocab_size)
        self.check_tokenizer(tokenizer)
        return tokenizer

    def _training_sample(self, split: Split, bar: Bar) -> Iterator[str]:
        """Yield the first training texts, up to `BPE_SAMPLE_BYTES` in all."""
        left = BPE_SAMPLE_BYTES
        for side, document, _ in split.assign(self.corpus.documents()):
            if side == VALIDATION:
                continue
            for piece in document.pieces:
                yield piece
                size = len(piece.encode("utf-8"))
                bar.advance(size)
                left -= size
                if left <= 0:
                    bar.pulse("training the tokenizer")
                    return
        bar.pulse("training the tokenizer")


def _warn_of_copies(data: PreparedData) -> None:
    copies = data.manifest.get("copies")
    # older sets have none
    if isinstance(copies, dict) and copies.get("num_documents"):
        count, some = copies["num_documents"], visible(", ".join(copies["some"]), keep="")
        more = f" and {count - _NAMES_SHOWN:,} more" if count > _NAMES_SHOWN else ""
        warnings.warn(
            f"validation data: {count:,} of {plural(data.validation.num_documents, 'document')} "
            f"{'is' if count == 1 else 'are'} in the training data as well ({some}{more}); "
            "they make the validation loss too low: remove them from one of the two",
            UserWarning,
            stacklevel=3,
        )


def _first_split(corpus: Corpus, held_out: Corpus | None, fraction: float, seed: int) -> Split:
    if held_out is not None:
        return Split(seed, 0)
    if len(corpus.sources) == 1 and corpus.num_bytes is not None and _is_one_text(corpus):
        # known to be one document, so it need not be read twice
        return Split(seed, 0, int(corpus.num_bytes * (1 - fraction)))
    split = Split(seed, int(fraction * 2**64))
    if len(corpus.sources) > 1 and all(source.kind == "text" for source in corpus.sources):
        # the names are known, so an empty side is detected before anything is read
        for source in corpus.sources:
            split.observe(source.name)
        return split.better() or Split(seed, split.below)
    return split


def _is_one_text(corpus: Corpus) -> bool:
    source = corpus.sources[0]
    try:
        return not holds_json_lines(Path(source.location), corpus.text_field, source.explicit)
    except NotText:
        # reading the file reports the error
        return True


def _is_small(corpus: Corpus) -> bool:
    known = all(source.kind != "hub" for source in corpus.sources)
    return known and sum(source.num_bytes for source in corpus.sources) < _SERIAL_BELOW_BYTES


def _nothing_left(what: str, corpus: Corpus) -> str:
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(corpus.skipped.items()))
    named = ", ".join(corpus.specs)
    return f"no text for {what} in {named}" + (f" (skipped: {skipped})" if skipped else "") + "; name other data"


def _skipped(*corpora: Corpus | None) -> dict[str, int]:
    counts = sum((corpus.skipped for corpus in corpora if corpus is not None), Counter[str]())
    return dict(sorted(counts.items()))


def _describe_inputs(corpus: Corpus, held_out: Corpus | None) -> dict[str, Any]:
    corpora = [corpus] + ([held_out] if held_out is not None else [])
    return {
        "data": corpus.specs,
        "validation": held_out.specs if held_out is not None else [],
        "text_field": corpus.text_field,
        "num_files": sum(len(c.sources) for c in corpora),
        "num_bytes": sum(s.num_bytes for c in corpora for s in c.sources),
        "fingerprint": hashlib.sha256(" ".join(c.fingerprint() for c in corpora).encode()).hexdigest(),
    }


def _is_current(target: Path, inputs: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Return whether the target was made from the same files with the same settings."""
    if not (target / MANIFEST_FILE).is_file():
        return False
    try:
        manifest = read_set_manifest(target)
    except UserError:
        return False
    return _fits(manifest, inputs, settings)


def _fits(manifest: dict[str, Any], inputs: dict[str, Any], settings: dict[str, Any]) -> bool:
    found = manifest.get("inputs", {}).get("fingerprint")
    return found == inputs["fingerprint"] and manifest.get("settings") == settings


def _check_replaceable(target: Path) -> None:
    """Raise UserError if the target holds anything but a prepared set."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    manifest = target / MANIFEST_FILE
    # a damaged set, or one of another version, may be replaced
    if not manifest.is_file() or FORMAT not in manifest.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            f"{target}: exists and is not prepared data; choose another directory or remove it", "already-exists"
        )
