"""Read text files in blocks: decompress, check that they are UTF-8, and cut at line ends."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from hgrn2.errors import UserError
from hgrn2.extras import install_command

COMPRESSIONS = {".gz", ".xz", ".bz2", ".zst"}
BLOCK_BYTES = 1 << 20
# long documents are read and encoded in constant memory
PIECE_CHARS = 1 << 16


class NotText(UserError):
    """A file does not hold UTF-8 text.

    Attributes:
        reason: "empty", "binary", "not UTF-8", "damaged" or "unreadable"; skipped files are counted by it.
        code: "damaged" for that reason, otherwise "unreadable".
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message, "damaged" if reason == "damaged" else "unreadable")
        self.reason = reason


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading bytes, decompressing .gz, .xz, .bz2 and .zst.

    Raises:
        UserError: a .zst file, and the zstandard package is missing.
        OSError: the file cannot be opened.
    """
    match path.suffix.lower():
        case ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case ".xz":
            return cast(BinaryIO, lzma.open(path, "rb"))
        case ".bz2":
            return cast(BinaryIO, bz2.open(path, "rb"))
        case ".zst":
            return cast(BinaryIO, io.BufferedReader(_ZstReader(path), BLOCK_BYTES))
    return path.open("rb")


def read_blocks(path: Path) -> Iterator[bytes]:
    """Yield a file's decompressed bytes in blocks.

    Raises:
        NotText: the file cannot be read or its compressed data is damaged.
    """
    try:
        with open_binary(path) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
    except UserError:
        raise
    except Exception as error:
        raise read_error(path, error) from error


def read_error(path: Path, error: Exception) -> Exception:
    """Return the exception to raise for an error while reading a file: NotText, or the error itself if it is a bug."""
    damaged = isinstance(error, (gzip.BadGzipFile, EOFError, lzma.LZMAError, zlib.error))
    # zstandard is optional, so its error is recognised by name; bz2 reports damage as an OSError without errno
    damaged = damaged or type(error).__name__ == "ZstdError" or (path.suffix.lower() == ".bz2" and not _errno(error))
    if damaged:
        return NotText(
            f"{path}: the compressed data is damaged or cut short: {error}; fetch or compress it anew", "damaged"
        )
    if isinstance(error, OSError):
        return NotText(f"{path}: cannot be read: {error.strerror or error}", "unreadable")
    return error


def read_text(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in blocks, without a byte order mark.

    Raises:
        NotText: the file is empty, holds a NUL byte or is not UTF-8; the message names the byte offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    offset = 0
    for block in read_blocks(path):
        if offset == 0:
            if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise NotText(f"{path}: looks like UTF-16; convert it to UTF-8", "not UTF-8")
            if block.startswith(codecs.BOM_UTF8):
                offset, block = len(codecs.BOM_UTF8), block[len(codecs.BOM_UTF8) :]
        if (nul := block.find(b"\0")) >= 0:
            raise NotText(f"{path}: binary, not text (NUL byte at offset {offset + nul}); name text files", "binary")
        yield _decode(decoder, block, offset, path)
        offset += len(block)
    if offset == 0:
        raise NotText(f"{path}: the file is empty; name another", "empty")
    yield _decode(decoder, b"", offset, path, final=True)


def cut_pieces(blocks: Iterable[str], piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a text into non-empty pieces of at most piece_chars characters, independent of the input blocks.

    Cuts fall after a line end between two non-space characters if there is one, else after any line end, else
    anywhere. The pieces are for reading and for training a tokenizer. Encoded one by one they may give other tokens
    than the whole text; `hgrn2.data.pieces.cut_document` makes pieces that do not.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        # one character more than a piece, to see the one after its last line end
        while len(rest) - start > piece_chars:
            stop = _cut(rest, start, start + piece_chars)
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    if rest:
        yield rest


def _cut(text: str, start: int, stop: int) -> int:
    last = end = text.rfind("\n", start, stop)
    # search only the second half, or pieces would become small
    middle = (start + stop) // 2
    while end > middle and (text[end - 1].isspace() or text[end + 1].isspace()):
        end = text.rfind("\n", middle, end)
    if end > middle:
        return end + 1
    return last + 1 if last >= start else stop


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, offset: int, path: Path, final: bool = False) -> str:
    num_pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        position = offset - num_pending + error.start
        byte = error.object[error.start]
        raise NotText(f"{path}: not UTF-8 (byte 0x{byte:02x} at offset {position}); convert it", "not UTF-8") from error


class _ZstReader(io.RawIOBase):
    """Reader of a .zst file; unlike the library's own reader it detects a truncated file."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise UserError(
                f"{path}: reading .zst needs zstandard: {install_command('data')}", "unavailable"
            ) from error
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = self._output = b""
        self._file = path.open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._output:
            self._input = self._input or self._file.read(BLOCK_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame has no end")
                return 0
            self._frame = self._frame or self._new_frame()
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        part, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()
        super().close()


def _errno(error: Exception) -> int | None:
    return error.errno if isinstance(error, OSError) else -1
