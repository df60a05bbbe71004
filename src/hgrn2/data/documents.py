"""Documents inside files: a whole text file, the lines of .jsonl, the rows of .parquet or a Hub dataset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hgrn2.data.hub import hub_reachable
from hgrn2.data.text import cut_pieces, open_binary, read_error, read_text
from hgrn2.errors import UserError
from hgrn2.extras import install_command
from hgrn2.json_files import parse_json


@dataclass(frozen=True)
class Document:
    """A text and its name.

    Attributes:
        name: unique in its corpus and independent of where the files lie.
        pieces: the text in order, in pieces of bounded size; can be iterated once.
        source: the name of the file or dataset it is a row of; empty for a file that is one document.
    """

    name: str
    pieces: Iterator[str]
    source: str = ""


def text_document(name: str, path: Path) -> Document:
    """A text file as one document; a NotText error comes while its pieces are read."""
    return Document(name, cut_pieces(read_text(path)))


def jsonl_documents(name: str, path: Path, field: str) -> Iterator[Document]:
    """One document a line, the string under a key; lines with an empty text are left out.

    Raises:
        UserError: a line is not a JSON object, has no such string, or holds a NUL; the message names the line.
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


def parquet_documents(name: str, path: Path, column: str) -> Iterator[Document]:
    """One document a row, the string in a column; empty and null texts are left out.

    Raises:
        UserError: pyarrow is missing, the file is damaged, it has no such column of strings, or a row holds a NUL.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading .parquet needs pyarrow: {install_command('data')}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"{path}: no column {column!r} (columns: {', '.join(names)}); name the text field")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    text = _row_text({column: text}, column, f"{path}, row {row}")
                    if text:
                        yield Document(f"{name}#{row}", cut_pieces([text]), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {_first_line(error)}") from error


def hub_documents(spec: str, field: str) -> Iterator[Document]:
    """One document a row of a Hugging Face dataset, streamed; empty texts are left out.

    Args:
        spec: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (CONFIG may be empty); the split is "train" if not given.
        field: the column.

    Raises:
        UserError: datasets is missing, the Hub cannot be reached, there is no such dataset or column, or a
            row holds a NUL.
    """
    name, _, rest = spec.partition(":")
    config, _, split = rest.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{spec}: needs the package datasets: {install_command('data')}") from error
    if not Path(name).exists() and not hub_reachable():
        raise UserError(
            f"hf:{spec}: no such file or folder here, and the Hugging Face Hub cannot be reached (offline); "
            "connect, or name files"
        )
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            text = _row_text(row, field, f"hf:{spec}, row {number}")
            if text:
                yield Document(f"hf:{spec}#{number}", cut_pieces([text]), f"hf:{spec}")
    except UserError:
        raise
    except Exception as error:  # the library lets errors of many others through
        raise UserError(f"hf:{spec}: cannot be read: {type(error).__name__}: {_first_line(error)}") from error


def _json_text(line: bytes, field: str, where: str) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); mend the line or take it out") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, wanted an object with the key {field!r}")
    text = _row_text(row, field, where)
    if b"\\u" in line:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{where}: the text holds half a surrogate pair, which is no character") from error
    return text


def _row_text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where}: no field {field!r} (fields: {', '.join(map(str, row))}); name the text field")
    text = row[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} holds {type(text).__name__}, wanted a string")
    if (nul := text.find("\0")) >= 0:
        raise UserError(f"{where}: binary, not text (NUL at character {nul}); take it out")
    return text


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no details")
