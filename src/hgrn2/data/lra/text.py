"""Byte-level text of Long Range Arena: IMDB reviews, and pairs of papers for retrieval."""

from __future__ import annotations

import ast
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hgrn2.data.lra.sequences import LabelledSequences, pack_bytes
from hgrn2.errors import UserError

_SENTIMENTS = ("negative", "positive")
_PAIRS = ("unrelated", "related")
# of the official tsv files: label, id of each paper, text of each paper
_COLUMNS = 5


def read_reviews(folder: Path, split: str, max_length: int) -> LabelledSequences:
    """Read IMDB reviews as bytes.

    Args:
        folder: holds the official folders (train/pos, train/neg, ...), or train.jsonl(.xz) and test.jsonl(.xz) with
            [text, label, ...] or {"text": ..., "label": ...} in each line.
        split: "train" or "test".
        max_length: longest sequence; longer reviews are cut, and counted in `notes`.

    Raises:
        UserError: files are missing, damaged or truncated, or a label is neither 0 nor 1.
    """
    notes: dict[str, int] = {}
    texts: list[bytes] = []
    labels: list[int] = []
    if (folder / split).is_dir():
        for label, name in enumerate(("neg", "pos")):
            for path in sorted((folder / split / name).glob("*.txt")):
                texts.append(path.read_bytes())
                labels.append(label)
        what = str(folder / split)
    else:
        path = _first(folder, (f"{split}.jsonl", f"{split}.jsonl.xz"))
        what = str(path)
        for number, line in enumerate(_lines(path), 1):
            text, label = _review(line, f"{path}, line {number}")
            # unlabelled reviews of the official set
            if label == -1:
                notes["unlabelled"] = notes.get("unlabelled", 0) + 1
                continue
            texts.append(text)
            labels.append(label)
    inputs, lengths = pack_bytes(texts, max_length, notes)
    return LabelledSequences(inputs, lengths, np.array(labels, np.int64), _SENTIMENTS, notes).checked(what)


def _review(line: bytes, what: str) -> tuple[bytes, int]:
    try:
        found = json.loads(line)
        text, label = (found["text"], found["label"]) if isinstance(found, dict) else (found[0], found[1])
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"{what}: wanted [text, label] or an object with text and label", "damaged") from None
    if not isinstance(text, str):
        raise UserError(f"{what}: the text is {text!r}; wanted a text in quotes", "damaged")
    if label not in (-1, 0, 1) or isinstance(label, bool):
        raise UserError(f"{what}: the label is {label!r}; wanted 0, 1, or -1 for none", "mismatch")
    return text.encode("utf-8", "surrogatepass"), label


def read_pairs(path: Path, max_length: int) -> LabelledSequences:
    """Read pairs of texts as bytes, from an official file of the retrieval task, new_aan_pairs.train.tsv.

    Args:
        path: lines of five columns between tabs: label, two ids, two texts; .xz is decompressed. The files hold Python
            literals of bytes, b'...', which are decoded.
        max_length: longest sequence; longer texts are cut, and counted in `notes`.

    Raises:
        UserError: the file is missing or truncated, a line has another number of columns, or a label is neither 0
            nor 1.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file", "not-found")
    notes: dict[str, int] = {}
    texts: list[bytes] = []
    labels: list[int] = []
    for number, line in enumerate(_lines(path), 1):
        columns = line.rstrip(b"\r\n").split(b"\t")
        if len(columns) != _COLUMNS:
            raise UserError(f"{path}, line {number}: has {len(columns)} columns; wanted {_COLUMNS}", "damaged")
        try:
            label = float(columns[0])
        except ValueError:
            label = -1.0
        if label not in (0, 1):
            raise UserError(f"{path}, line {number}: the label is {columns[0]!r}; wanted 0 or 1", "mismatch")
        labels.append(int(label))
        texts += [_literal(column) for column in columns[3:]]
    inputs, lengths = pack_bytes(texts, max_length, notes)
    pairs = inputs.reshape(-1, 2, max_length), lengths.reshape(-1, 2)
    return LabelledSequences(*pairs, np.array(labels, np.int64), _PAIRS, notes).checked(str(path))


def _literal(text: bytes) -> bytes:
    """Return the bytes that a Python literal such as b'text' stands for; other text as it is."""
    if text[:2] not in (b"b'", b'b"'):
        return text
    try:
        found = ast.literal_eval(text.decode("latin-1"))
    except (ValueError, SyntaxError):
        return text
    return found if isinstance(found, bytes) else text


def _first(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: has neither {' nor '.join(names)}, nor folders of reviews", "not-found")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
            yield from file
    except (EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); fetch it again", "damaged") from None
