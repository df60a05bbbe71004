"""Files of named tensors with a digest, which a reader checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgrn2.errors import UserError
from hgrn2.storage.json_files import parse_json
from hgrn2.storage.staging import check_writable_file, staged_file

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically, with a digest of everything in it.

    Args:
        path: the file to write.
        about: values of JSON; "format" names the kind of file.
        tensors: tensors on the CPU, contiguous.

    Raises:
        UserError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_writable_file(path)
    metadata = {"hgrn2": json.dumps(dict(about)), "sha256": digest(about, tensors)}
    try:
        with staged_file(path) as partial:
            save_file(dict(tensors), partial, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: the state cannot be written ({error}); name another file or free some space", "unwritable"
        ) from None


def read_tensors(
    path: Path, formats: Collection[str], remedy: str, without_digest: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file of `write_tensors` and check its digest.

    Args:
        path: the file.
        formats: values of "format" that can be read.
        remedy: what to do about a file that cannot be read, for messages.
        without_digest: those of the formats that may have no digest.

    Raises:
        UserError: the file is missing, damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            about = parse_json(metadata.get("hgrn2", "{}"))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: contains no readable state ({error}); {remedy}", "unreadable") from None
    if not isinstance(about, dict) or about.get("format") not in formats:
        raise UserError(f"{path}: not a state of this version; {remedy}", "version")
    found = metadata.get("sha256")
    if found is None and about["format"] in without_digest:
        return about, tensors
    if found != digest(about, tensors):
        raise UserError(f"{path}: damaged or edited (its content does not match its checksum); {remedy}", "damaged")
    return about, tensors


def digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return a hex digest of metadata and tensors."""
    import torch

    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        found.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        # without torch.uint8's numpy for tensors of no elements
        found.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
