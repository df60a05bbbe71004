"""Resolve the data that the user names into a sorted list of sources, whose documents are read lazily."""

from __future__ import annotations

import difflib
import fnmatch
import glob
import hashlib
import itertools
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hgrn2.data.documents import (
    Document,
    holds_json_lines,
    hub_documents,
    jsonl_documents,
    parquet_documents,
    text_document,
)
from hgrn2.data.permutation import keyed_integer
from hgrn2.data.text import BLOCK_BYTES, COMPRESSIONS, NotText, cut_pieces, read_text
from hgrn2.data.tokens import MANIFEST_FILE
from hgrn2.errors import UserError

STDLIB = "stdlib"
STDLIB_VALIDATION = "stdlib-validation"

Kind = Literal["text", "jsonl", "parquet", "hub"]

# tests, installed packages, and folders of tables, character sets and help texts
_STDLIB_LEFT_OUT = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),
    *("encodings", "pydoc_data"),
}
# modules that are mostly tables; not every version of Python has all of them
_STDLIB_TABLES = {
    *("_opcode_metadata.py", "html/entities.py", "locale.py", "msilib/schema.py", "msilib/sequence.py"),
    *("re/_casefix.py", "stringprep.py"),
}
# build settings; the file name includes the platform
_STDLIB_TABLE_PREFIX = "_sysconfigdata"
# many small files represent the rest better than a few large ones
_VALIDATION_BYTES = range(1000, 20_000)
_VALIDATION_ONE_IN = 6
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]*(:[\w.\[\]%:+-]+)?)?")
# skipped without opening; other binary files are detected by reading them
_BINARY_NAMES = (
    ".7z .a .arrow .avi .bin .bmp .class .ckpt .db .dll .dylib .eot .exe .gguf .gif .h5 .ico .idx .jar "
    ".jpeg .jpg .mkv .mov .mp3 .mp4 .npy .npz .o .ogg .onnx .otf .pack .pdf .pickle .pkl .png .ppt .pptx "
    ".pt .pth .pyc .pyd .pyo .rar .safetensors .so .sqlite .tar .tgz .tif .tiff .ttf .wav .webm .webp "
    ".whl .woff .woff2 .xls .xlsx .zip"
)
_BINARY_SUFFIXES = frozenset(_BINARY_NAMES.split())


@dataclass(frozen=True)
class Source:
    """A file or Hub dataset that holds documents.

    Attributes:
        name: the name of its document, or the prefix of its documents' names.
        kind: format of the source.
        location: the path, or NAME[:CONFIG[:SPLIT]] of a Hub dataset.
        explicit: named by the user rather than found in a folder, so bad content is an error and not skipped.
        num_bytes: size of the file; 0 for a Hub dataset.
        mtime_ns: modification time of the file.
    """

    name: str
    kind: Kind
    location: str
    explicit: bool
    num_bytes: int = 0
    mtime_ns: int = 0

    def documents(self, text_field: str) -> Iterator[Document]:
        """Yield the documents in order."""
        path = Path(self.location)
        match self.kind:
            case "text" if holds_json_lines(path, text_field, self.explicit):
                yield from jsonl_documents(self.name, path, text_field)
            case "text":
                yield text_document(self.name, path)
            case "jsonl":
                yield from jsonl_documents(self.name, path, text_field)
            case "parquet":
                yield from parquet_documents(self.name, path, text_field)
            case "hub":
                yield from hub_documents(self.location, text_field)


@dataclass
class Corpus:
    """Sources, sorted by name, independent of the order in which they were given and of their location.

    Attributes:
        specs: the data as the user named it.
        sources: the sources, sorted by name.
        text_field: the key or column of the text in .jsonl, .parquet and Hub datasets.
        skipped: number of skipped files by reason; `documents` adds those it finds while reading.
    """

    specs: list[str]
    sources: list[Source]
    text_field: str = "text"
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def num_bytes(self) -> int | None:
        """Bytes of text, if known before reading; None with compressed files, .jsonl, .parquet or the Hub."""
        if all(s.kind == "text" and Path(s.location).suffix.lower() not in COMPRESSIONS for s in self.sources):
            return sum(s.num_bytes for s in self.sources)
        return None

    def documents(self) -> Iterator[Document]:
        """Yield every document in order, read lazily.

        Raises:
            UserError: a file that the user named cannot be used. One found in a folder is counted in `skipped` instead.
        """
        # start from the listing, so that a second reading does not count twice
        found = Counter(self._skipped_at_listing)
        self.skipped = found
        for source in self.sources:
            if source.kind == "text" and not source.explicit:
                try:
                    is_text = not holds_json_lines(Path(source.location), self.text_field, source.explicit)
                    document = _checked_document(source) if is_text else None
                except NotText as error:
                    found[error.reason] += 1
                    continue
                if document is not None:
                    yield document
                    continue
            document = None
            for document in source.documents(self.text_field):
                yield document
            if document is None:
                if source.explicit:
                    raise NotText(f"{source.location}: holds no document with text; name another file", "empty")
                found["empty"] += 1

    def __post_init__(self) -> None:
        self._skipped_at_listing = Counter(self.skipped)

    def fingerprint(self) -> str:
        """Return a hex digest of path, size and modification time of every file, and of the names of Hub datasets."""
        entries = [[s.kind, s.name, s.location, s.num_bytes, s.mtime_ns, s.explicit] for s in self.sources]
        return hashlib.sha256(json.dumps([self.text_field, entries]).encode()).hexdigest()

    def without(self, other: Corpus) -> Corpus:
        """Return this corpus without the files that are also in another."""
        locations = {s.location for s in other.sources}
        kept = [s for s in self.sources if s.location not in locations]
        skipped = Counter(self.skipped)
        if len(kept) < len(self.sources):
            skipped["also in the validation data"] = len(self.sources) - len(kept)
        return Corpus(self.specs, kept, self.text_field, skipped)


def open_corpus(specs: str | Path | Sequence[str | Path], text_field: str = "text") -> Corpus:
    """Find the sources that the user names.

    Args:
        specs: any number of: a text file; a folder, read recursively; a glob; .jsonl or .parquet (text and .jsonl also
            as .gz, .xz, .bz2 or .zst); "hf:NAME[:CONFIG[:SPLIT]]" or a plain Hub dataset name; "stdlib", the source
            code of Python's standard library without tests and tables; "stdlib-validation", a fixed sample of about
            sixty of its files.
        text_field: the key or column of the text in .jsonl, .parquet and Hub datasets.

    Raises:
        UserError: a source does not exist or holds nothing to read.

    Example:
        >>> open_corpus("stdlib").sources[0].name
        'stdlib/__future__.py'
    """
    specs = [specs] if isinstance(specs, (str, Path)) else list(specs)
    if not specs:
        raise UserError("no data given; name files, folders or datasets, or 'stdlib'")
    skipped: Counter[str] = Counter()
    found: list[Source] = []
    for spec in specs:
        sources = list(_resolve(str(spec), skipped))
        if not sources:
            counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
            counts = f" (skipped: {counts})" if counts else ""
            raise UserError(
                f"data {str(spec)!r}: no file to read there{counts}; name text files or a folder with some", "not-found"
            )
        found.extend(sources)
    # a file both named and found in a folder counts as named; a file with several names (links) takes the smallest
    # one, whatever the order of the listing
    unique: dict[str, Source] = {}
    for source in sorted(found, key=lambda s: (not s.explicit, s.name)):
        unique.setdefault(source.location, source)
    ordered = sorted(unique.values(), key=lambda s: (s.name, s.location))
    return Corpus([str(s) for s in specs], list(_with_unique_names(ordered)), text_field, skipped)


def _resolve(spec: str, skipped: Counter[str]) -> Iterator[Source]:
    if not spec:
        raise UserError("data '': names nothing; name a file, a folder ('.' for this one), a dataset or 'stdlib'")
    try:
        path = Path(spec).expanduser()
        is_folder, exists, is_link = path.is_dir(), path.exists(), path.is_symlink()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"data {spec!r}: cannot be read: {reason}; name something that can be", "unreadable") from error
    if spec in (STDLIB, STDLIB_VALIDATION):
        for source in _stdlib_sources(skipped):
            if spec == STDLIB or _is_for_validation(source):
                yield source
    elif spec.startswith("hf:"):
        yield _hub_source(spec.removeprefix("hf:"))
    elif is_folder:
        yield from _folder_sources(path, skipped)
    elif exists:
        # documents may be read twice, which a pipe does not allow
        if not path.is_file():
            raise UserError(
                f"data {spec!r}: a pipe or device, not a file; write it to a file first and name that", "unsupported"
            )
        yield _file_source(path, path.name, explicit=True)
    elif is_link:
        raise UserError(f"data {spec!r}: a broken link: no such file or folder; name the file itself", "not-found")
    elif glob.has_magic(spec):
        yield from _glob_sources(str(path), skipped)
    elif "/" in spec and _HUB_NAME.fullmatch(spec) and not path.suffix and spec[0] not in "./~":
        yield _hub_source(spec)
    else:
        here = path.parent if path.parent.is_dir() else Path()
        near = difflib.get_close_matches(path.name, sorted(os.listdir(here)), n=1, cutoff=0.7)
        meant = f"did you mean {str(path.parent / near[0])!r}? " if near else ""
        raise UserError(
            f"data {spec!r}: no such file or folder; {meant}A Hugging Face dataset is named hf:NAME", "not-found"
        )


def _hub_source(name: str) -> Source:
    if not name:
        raise UserError("data 'hf:': no dataset named; wanted hf:NAME[:CONFIG[:SPLIT]]")
    return Source(f"hf:{name}", "hub", name, explicit=True)


def _stdlib_sources(skipped: Counter[str]) -> Iterator[Source]:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "os.py").is_file():
        raise UserError(f"data 'stdlib': this Python keeps no source code in {root}; name other data", "unavailable")
    for folder, files in _walk(root, lambda name: name not in _STDLIB_LEFT_OUT, skipped):
        for name in files:
            path = Path(folder, name)
            module = path.relative_to(root).as_posix()
            if module in _STDLIB_TABLES or name.startswith(_STDLIB_TABLE_PREFIX):
                continue
            # some modules are empty files
            if path.suffix == ".py" and path.stat().st_size:
                yield _file_source(path, f"stdlib/{module}", explicit=False)


def _is_for_validation(source: Source) -> bool:
    chosen = keyed_integer(STDLIB_VALIDATION, 0, source.name) % _VALIDATION_ONE_IN == 0
    return chosen and source.num_bytes in _VALIDATION_BYTES


def _folder_sources(root: Path, skipped: Counter[str]) -> Iterator[Source]:
    if (root / MANIFEST_FILE).is_file() and (root / "train" / MANIFEST_FILE).is_file():
        raise UserError(
            f"data {str(root)!r}: is a prepared set, not text; open it with hgrn2.data.PreparedData.open", "unsupported"
        )
    for folder, files in _walk(root, lambda name: not name.startswith(".") and name != "__pycache__", skipped):
        for name in files:
            path = Path(folder, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            else:
                yield from _found_file(path, f"{root.resolve().name}/{path.relative_to(root).as_posix()}", skipped)


def _walk(root: Path, wanted: Callable[[str], bool], skipped: Counter[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder from the root down with its file names; links to folders are counted, not followed."""

    def count_unreadable(error: OSError) -> None:
        skipped["unreadable folder"] += 1

    for folder, subfolders, files in os.walk(root, onerror=count_unreadable):
        subfolders[:] = sorted(name for name in subfolders if wanted(name))
        skipped.update("link to a folder" for name in subfolders if os.path.islink(os.path.join(folder, name)))
        yield folder, sorted(files)


def _glob_sources(pattern: str, skipped: Counter[str]) -> Iterator[Source]:
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    rest = Path(pattern).parts[len(fixed.parts) :]
    for path in dict.fromkeys(_expand(fixed, rest, skipped)):
        if path.is_file():
            yield from _found_file(path, path.relative_to(fixed).as_posix(), skipped)


def _expand(folder: Path, parts: Sequence[str], skipped: Counter[str]) -> Iterator[Path]:
    """Yield the sorted matches of a glob below a folder; unlike `glob`, do not follow links to folders.

    Links to parent folders make cycles, which `glob` would follow exponentially often.
    """
    part, rest = parts[0], parts[1:]
    if part == "**":
        for subfolder, files in _walk(folder, lambda name: not name.startswith("."), skipped):
            if rest and rest[0] != "**":
                yield from _expand(Path(subfolder), rest, skipped)
            elif not rest:
                yield from (Path(subfolder, name) for name in files if not name.startswith("."))
        if rest and rest[0] == "**":
            yield from _expand(folder, rest, skipped)
        return
    try:
        names = sorted(fnmatch.filter(os.listdir(folder), part)) if glob.has_magic(part) else [part]
    except NotADirectoryError:
        return
    except OSError:
        skipped["unreadable folder"] += 1
        return
    for path in (folder / name for name in names if part.startswith(".") or not name.startswith(".") or name == part):
        if not rest:
            yield path
        elif path.is_symlink() and path.is_dir():
            skipped["link to a folder"] += 1
        elif path.is_dir():
            yield from _expand(path, rest, skipped)


def _found_file(path: Path, name: str, skipped: Counter[str]) -> Iterator[Source]:
    if path.suffix.lower() in _BINARY_SUFFIXES:
        skipped["binary"] += 1
        return
    try:
        if path.is_file():
            yield _file_source(path, name, explicit=False)
        else:
            skipped["unreadable"] += 1
    except OSError:
        skipped["unreadable"] += 1


def _file_source(path: Path, name: str, explicit: bool) -> Source:
    status = path.stat()
    inner = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    kinds: dict[str, Kind] = dict.fromkeys((".jsonl", ".ndjson", ".ldjson", ".jl"), "jsonl")
    kinds |= {".parquet": "parquet"}
    kind = kinds.get(inner.suffix.lower(), "text")
    if kind == "parquet" and inner != path:
        raise UserError(f"{path}: parquet is compressed inside already; decompress the file first", "unsupported")
    return Source(name, kind, str(path.resolve()), explicit, status.st_size, status.st_mtime_ns)


def _with_unique_names(sources: list[Source]) -> Iterator[Source]:
    times: Counter[str] = Counter()
    for source in sources:
        times[source.name] += 1
        count = times[source.name]
        yield source if count == 1 else replace(source, name=f"{source.name} ({count})")


def _checked_document(source: Source) -> Document:
    """Return a text file found in a folder as a document, after checking all of it."""
    path = Path(source.location)
    if source.num_bytes <= BLOCK_BYTES and path.suffix.lower() not in COMPRESSIONS:
        return Document(source.name, cut_pieces(list(read_text(path))))
    for _ in read_text(path):
        pass
    return text_document(source.name, path)
