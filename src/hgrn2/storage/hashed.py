"""Write files with their SHA-256 computed on the way and fsync them before the call returns."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hgrn2.storage.staging import sync_path

if TYPE_CHECKING:
    from torch import Tensor

# torch's names of dtypes and those of the format, https://huggingface.co/docs/safetensors
SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor] | None = None) -> str:
    """Write a safetensors file tensor by tensor, fsync it, and return its SHA-256.

    The writer of the safetensors package reports a full disk as text in a general error and needs a second pass for
    the checksum. This one raises the operating system's error and holds one tensor in memory at a time.

    Args:
        path: the file to write.
        tensors: tensors by name, on any device; copied to the CPU one at a time.
        read: returns the tensor of a name just before it is written. With it, `tensors` gives shapes and dtypes only
            and may hold meta tensors.

    Raises:
        OSError: the file cannot be written.
    """
    # here: processes that tokenise need the checksums below, but not torch, which takes seconds
    import torch

    # widest dtypes first: every tensor is then aligned to its element size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    # older versions of transformers refuse a file without this key
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            file.write(piece)
        for name in names:
            tensor = tensors[name] if read is None else read(name)
            assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape), name
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_text(path: Path, text: str) -> str:
    """Write a text file, fsync it, and return its SHA-256."""
    data = text.encode()
    path.write_bytes(data)
    sync_path(path)
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits; reads the file in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
