"""Read the tensors of a folder from any kind of file: listed at once, read one at a time."""

from __future__ import annotations

import errno
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.storage.hashed import SAFETENSORS_DTYPES
from hgrn2.storage.json_files import read_json_object

CONFIG_NAME = "config.json"
SAFETENSORS_NAME = "model.safetensors"
# file formats of weights; the first one found is read
_FORMS = (
    (SAFETENSORS_NAME, f"{SAFETENSORS_NAME}.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_DTYPES = {name: getattr(torch, dtype) for dtype, name in SAFETENSORS_DTYPES.items()}
_COPY_AGAIN = "copy it again from where it came"
# maximum number of names in a message
_NAMES_SHOWN = 8


@dataclass(frozen=True)
class TensorSpec:
    """Description of a tensor before it is read.

    Attributes:
        shape: the sizes of its axes.
        dtype: the dtype of torch, or the name in the file if torch has no equivalent.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | str


class _Shard(Protocol):
    specs: dict[str, TensorSpec]

    def read(self, name: str, start: int, stop: int) -> Tensor: ...


class Weights:
    """The tensors of a folder.

    Args:
        folder: a folder with `model.safetensors`, `pytorch_model.bin`, or shards of one of them with an index.

    Attributes:
        folder: the folder.
        specs: shape and dtype of each tensor.

    Raises:
        UserError: no such file, more than one, an index that does not match its shards, or a file that is truncated or
            holds anything but tensors.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        file = find_weights(folder)
        if file is None:
            names = ", ".join(name for form in _FORMS for name in form)
            raise UserError(
                f"{folder}: no weights there (looked for {names}); name a folder that has them", "not-found"
            )
        self._shards: dict[str, _Shard] = _open_index(file) if file.suffix == ".json" else _by_name(_open_shard(file))
        self.specs = {name: shard.specs[name] for name, shard in self._shards.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a tensor, by default all, to the CPU."""
        if not self.specs[name].shape:
            return self._shards[name].read(name, 0, 0)
        return self._shards[name].read(name, start, self.specs[name].shape[0] if stop is None else stop)


def find_weights(folder: Path) -> Path | None:
    """Return the file of a folder's weights, or the index of its shards; None if there is none.

    Raises:
        UserError: the folder has both a whole file and shards of the same format.
    """
    for form in _FORMS:
        found = [folder / name for name in form if (folder / name).is_file()]
        if len(found) > 1:
            raise UserError(
                f"{folder}: holds both {' and '.join(form)}; remove the one that is not of this model", "contradiction"
            )
        if found:
            return found[0]
    return None


def _by_name(shard: _Shard) -> dict[str, _Shard]:
    return dict.fromkeys(shard.specs, shard)


def _open_index(index: Path) -> dict[str, _Shard]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{index}: no weight_map from tensors to files in it; {_COPY_AGAIN}", "damaged")
    files = sorted(set(places.values()))
    # an index may only name files in its own folder
    outside = [file for file in files if Path(file).name != file or file in ("", ".", "..")]
    if outside:
        raise UserError(f"{index}: names {outside[0]!r}; wanted names of files beside it", "damaged")
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise UserError(
            f"{index}: names {name_some(absent)}, which {'is' if len(absent) == 1 else 'are'} not there", "not-found"
        )
    shards = {file: _open_shard(index.parent / file) for file in files}
    strayed = [name for name, file in places.items() if name not in shards[file].specs]
    if strayed:
        where = {name: file for file, shard in shards.items() for name in shard.specs}
        found = where.get(strayed[0])
        raise UserError(
            f"{index}: says that {_printable(strayed[0])} is in {places[strayed[0]]}, but it is in "
            f"{'no shard' if found is None else found} ({len(strayed)} such tensors); {_COPY_AGAIN}",
            "damaged",
        )
    unlisted = [
        f"{name} in {file}" for file, shard in shards.items() for name in shard.specs if places.get(name) != file
    ]
    if unlisted:
        raise UserError(f"{index}: does not name {name_some(unlisted)}; {_COPY_AGAIN}", "damaged")
    return {name: shards[file] for name, file in places.items()}


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: the file is missing or does not hold an object.
    """
    if not file.exists():
        raise UserError(f"{file.parent}: no {file.name} there; name a folder that has one", "not-found")
    return read_json_object(file, _COPY_AGAIN)


def name_some(names: Iterable[str]) -> str:
    """Return the first few names in one line, and the number of the others."""
    names = list(names)
    more = len(names) - _NAMES_SHOWN
    return ", ".join(map(_printable, names[:_NAMES_SHOWN])) + (f" and {more} more" if more > 0 else "")


def _printable(name: str) -> str:
    # names in a damaged file may be anything
    return name if name.isprintable() else repr(name)


def _open_shard(file: Path) -> _Shard:
    try:
        return _Safetensors(file) if file.suffix == ".safetensors" else _Pickle(file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})", "unreadable") from None


class _Safetensors:
    """A memory-mapped safetensors file."""

    def __init__(self, file: Path):
        try:
            self._file = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise UserError(
                f"{file}: truncated, or not a safetensors file ({error}); {_COPY_AGAIN}", "unreadable"
            ) from None
        self.specs = {}
        names: list[str] = self._file.keys()
        for name in names:
            found = self._file.get_slice(name)
            dtype: str = found.get_dtype()
            known = _DTYPES.get(dtype)
            self.specs[name] = TensorSpec(tuple(found.get_shape()), dtype if known is None else known)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        if not self.specs[name].shape:
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[start:stop]


class _Pickle:
    """A file written by torch.save; files from before PyTorch 1.6 are read whole."""

    def __init__(self, file: Path):
        try:
            with warnings.catch_warnings():
                # warnings about pickle protocols; unreadable files raise an error anyway
                warnings.simplefilter("ignore")
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except pickle.UnpicklingError as error:
            code = re.search(r"GLOBAL (\S+)", str(error))
            if code is None:
                raise UserError(
                    f"{file}: truncated, or not a PyTorch file with only tensors in a pickle of protocol 2 (code is "
                    f"not run); {_COPY_AGAIN}, or save it again, preferably as safetensors",
                    "unreadable",
                ) from None
            raise UserError(
                f"{file}: holds code ({_printable(code[1])}), which is not run; "
                "save only the tensors, preferably as safetensors",
                "unreadable",
            ) from None
        except OSError as error:
            # offsets in a damaged file may be invalid
            if error.errno != errno.EINVAL:
                raise
            raise UserError(
                f"{file}: truncated, or not a PyTorch file with only tensors; {_COPY_AGAIN}", "unreadable"
            ) from None
        except Exception:
            # a damaged file may raise any exception
            raise UserError(
                f"{file}: truncated, or not a PyTorch file with only tensors; {_COPY_AGAIN}", "unreadable"
            ) from None
        if not isinstance(found, dict):
            raise UserError(f"{file}: holds {type(found).__name__}; wanted a table of tensors", "unreadable")
        others = [str(name) for name, value in found.items() if not _is_plain(name, value)]
        if others:
            raise UserError(
                f"{file}: {name_some(others)}: not plain tensors; save only the model's state_dict", "unreadable"
            )
        self._tensors: dict[str, Tensor] = found
        self.specs = {name: TensorSpec(tuple(x.shape), x.dtype) for name, x in found.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        x = self._tensors[name].detach()
        return x[start:stop] if x.dim() else x


def _is_plain(name: Any, value: Any) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    plain = value.layout == torch.strided and not value.is_quantized and not value.is_nested
    return plain and value.device.type == "cpu"
