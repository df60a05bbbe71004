"""Read documents: whole text files, lines of .jsonl, rows of .parquet or of a Hub dataset."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2.data.hub import hub_reachable
from hgrn2.data.text import cut_pieces, open_binary, read_error, read_text
from hgrn2.errors import UserError, visible
from hgrn2.extras import install_command
from hgrn2.storage.json_files import parse_json

# longer lines are cut, and are then not JSON
_MAX_LINE_BYTES = 1 << 26


@dataclass(frozen=True)
class Document:
    """A text and its name.

    Attributes:
        name: unique in its corpus and independent of the location of the files.
        pieces: the text in pieces of bounded size; can be iterated once.
        source: the file or dataset of which the document is a row; empty if the file is one document.
    """

    name: str
    pieces: Iterator[str]
    source: str = ""


def text_document(name: str, path: Path) -> Document:
    """Return a text file as one document; reading its pieces may raise NotText."""
    return Document(name, cut_pieces(read_text(path)))


def jsonl_documents(name: str, path: Path, field: str) -> Iterator[Document]:
    """Yield one document a line, the string under a key; lines without text are skipped.

    Raises:
        UserError: a line is not a JSON object, lacks the string, or holds a NUL; the message names the line.
    """
    try:
        with open_binary(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.isspace():
                    continue
                text = _json_text(line, field, f"{path}, line {number}")
                if text:
                    yield Document(f"{name}#{number}", cut_pieces([text]), name)
    except UserError:
        raise
    except Exception as error:
        raise read_error(path, error) from error


def holds_json_lines(path: Path, field: str, is_named: bool) -> bool:
    """Return whether a file holds JSON lines under another suffix, as C4's `.json.gz` files do.

    Args:
        path: the file; if it starts with a brace, its first two lines are read.
        field: the key of the text; a file whose first line has it holds JSON lines.
        is_named: the user named the file, so JSON objects without the key are an error. In a folder they are text.

    Raises:
        UserError: the file was named and holds JSON objects without the key, or an array of objects.
        NotText: the file cannot be read.
    """
    try:
        with open_binary(path) as stream:
            if stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] not in (b"{", b"["):
                return False
        with open_binary(path) as stream:
            first, second = stream.readline(_MAX_LINE_BYTES), stream.readline(_MAX_LINE_BYTES)
    except UserError:
        raise
    except Exception as error:
        raise read_error(path, error) from error
    row = _json_object(first)
    if row is None:
        start = (first + second).removeprefix(codecs.BOM_UTF8).lstrip()
        if is_named and start[:1] == b"[" and start[1:].lstrip()[:1] == b"{":
            raise UserError(
                f"{path}: a JSON array of objects; write one object a line, as jq -c '.[]' does, to a .jsonl",
                "unreadable",
            )
        return False
    if isinstance(row.get(field), str):
        return True
    if is_named and _json_object(second) is not None:
        _row_text(row, field, f"{path}, line 1")
    return False


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def parquet_documents(name: str, path: Path, column: str) -> Iterator[Document]:
    """Yield one document a row, the string in a column; empty and null texts are skipped.

    Raises:
        UserError: pyarrow is missing, the file is damaged or lacks the column of strings, or a row holds a NUL.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs pyarrow: {install_command('data')}", "unavailable") from error
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"{path}: no column {column!r}; {_name_field(names)}", "not-found")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0):
                    row += 1
                    text = _row_text({column: _parquet_value(value, path, row)}, column, f"{path}, row {row}")
                    if text:
                        yield Document(f"{name}#{row}", cut_pieces([text]), name)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises errors of many types
        raise UserError(f"{path}: not a readable parquet file: {_first_line(error)}", "unreadable") from error


def _parquet_value(value: Any, path: Path, row: int) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path}, row {row}: not UTF-8 (byte 0x{byte:02x} at offset {error.start}); convert it", "unreadable"
        ) from None


def hub_documents(spec: str, field: str) -> Iterator[Document]:
    """Stream a Hugging Face dataset, one document a row; empty texts are skipped.

    Args:
        spec: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (CONFIG may be empty); the default split is "train".
        field: the column of the text.

    Raises:
        UserError: the datasets package is missing, the Hub cannot be reached, the dataset or column does not exist,
            or a row holds a NUL.
    """
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{spec}: needs the package datasets: {install_command('data')}", "unavailable") from error
    if not Path(name).exists() and not hub_reachable():
        raise UserError(
            f"hf:{spec}: no such file or folder here, and the Hugging Face Hub cannot be reached (offline); "
            "connect, or name files",
            "unavailable",
        )
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            text = _row_text(row, field, f"hf:{spec}, row {number}")
            if text:
                yield Document(f"hf:{spec}#{number}", cut_pieces([text]), f"hf:{spec}")
    except UserError:
        raise
    except Exception as error:  # the library passes on errors of many other packages
        raise UserError(
            f"hf:{spec}: cannot be read: {type(error).__name__}: {_first_line(error)}", "unreadable"
        ) from error


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); correct or remove the line", "unreadable") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, wanted an object with the key {field!r}", "unreadable")
    text = _row_text(row, field, where)
    if b"\\u" in line:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: the text holds half a surrogate pair, which is no character", "unreadable"
            ) from error
    return text


def _row_text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where}: no field {field!r}; {_name_field(row)}", "not-found")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} holds {type(text).__name__}, wanted a string", "unreadable")
    if (nul := text.find("\0")) >= 0:
        raise UserError(f"{where}: binary, not text (NUL at character {nul}); remove it", "unreadable")
    return text


def _name_field(keys: Iterable[Any]) -> str:
    shown = ", ".join(visible(str(key), keep="")[:40] for key in itertools.islice(keys, 12))
    return f"name the field of the text with --text-field (there: {shown or 'none'})"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no details")
