"""Write a checkpoint in another layout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hgrn2.data import load_tokenizer
from hgrn2.data.model_files import GENERATION_CONFIG_FILE, TOKENIZER_FILES, check_token_ids
from hgrn2.data.transformers_files import write_generation_config, write_transformers_files
from hgrn2.errors import UserError
from hgrn2.formats import native
from hgrn2.formats.card import CARD_NAME, write_card
from hgrn2.formats.layout import LAYOUTS
from hgrn2.formats.opening import FiniteCheck
from hgrn2.formats.reading import CONFIG_NAME, SAFETENSORS_NAME, read_json
from hgrn2.formats.tables import Table, stack
from hgrn2.models import HGRN2Config
from hgrn2.storage.hashed import write_safetensors, write_text
from hgrn2.storage.staging import staged_directory

MAX_SHARD_BYTES = 5_000_000_000

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Source(Protocol):
    """Interface of a model to write: a checkpoint (`ModelFolder`) or a `TransformerStart`."""

    @property
    def path(self) -> Path:
        """The folder, for messages."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """The content of its config.json."""
        ...

    @property
    def config(self) -> HGRN2Config:
        """Our configuration."""
        ...

    @property
    def names(self) -> list[str]:
        """Names of our tensors, in the order of the model."""
        ...

    def spec(self, name: str) -> Tensor:
        """Return one of our tensors as a meta tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """Read one of our tensors."""
        ...


@dataclass(frozen=True)
class Written:
    """Result of a conversion.

    Attributes:
        path: the new folder.
        num_tensors: number of tensors in its files.
        num_bytes: bytes of these tensors.
        num_shards: number of files.
    """

    path: Path
    num_tensors: int
    num_bytes: int
    num_shards: int


def convert(
    source: Source,
    out: Path,
    to: str,
    *,
    tokenizer_dir: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Written:
    """Write a checkpoint in another layout; the folder appears complete or not at all.

    Only one tensor of a file is in memory at a time.

    Args:
        source: a folder from `open_folder`, or a start from a Transformer.
        out: the new folder; must not exist.
        to: a name in `LAYOUTS`.
        tokenizer_dir: the folder of the source's tokenizer, whose files are copied.
        dtype: dtype of the new tensors; None keeps each dtype.
        max_shard_bytes: maximum size of a file; larger weights are split into several files with an index. "native" is
            always one file, as readers of runs expect.

    Raises:
        UserError: out exists or cannot be written, the layout cannot express the model, or the source's BOS, EOS or
            padding ids are invalid.
    """
    layout = LAYOUTS[to]
    if to != "native" and not source.config.intermediate_size:
        raise UserError(
            f"layout {to!r} has a channel mixer in every layer, and this model has none (intermediate_size = 0); "
            "keep it as native",
            "unsupported",
        )
    _check_new(out)
    settings = {"architectures": [layout.architecture], **layout.write_config(source.config)}
    if to == "native" and native.TRAIN_TABLE in source.settings:
        # keep the training settings, but not the paths of data and teacher
        train = dict(source.settings[native.TRAIN_TABLE])
        if train.get("teacher") is not None:
            train["teacher"] = Path(train["teacher"]).name
        settings[native.TRAIN_TABLE] = train
        if (task := native.task_name(source.settings)) is not None:
            # its options may hold paths
            settings[native.TASK_TABLE] = {"name": task}
    token_ids = _token_ids(source, tokenizer_dir)
    table = layout.tables(source.config, source.names)[0]
    specs = {name: stack([source.spec(part) for part in own]) for name, own in table.items()}
    if dtype is not None:
        specs = {name: spec.to(dtype) for name, spec in specs.items()}
    # the narrowest dtype that represents every tensor exactly
    widest = reduce(torch.promote_types, (spec.dtype for spec in specs.values()))
    settings["dtype"] = str(widest).removeprefix("torch.")
    shards = _shards(specs, None if to == "native" else max_shard_bytes)
    with staged_directory(out, replace=False) as stage:
        # another process may have made the folder while this one waited
        _check_new(out)
        _write_weights(source, stage, table, specs, shards)
        settings |= _take_tokenizer(source, token_ids, tokenizer_dir, stage)
        if to == "hf":
            card = write_card(
                out.name, source.config, source=source.path, settings=source.settings,
                has_tokenizer=any(stage.glob("*tokenizer.json")), dtype=settings["dtype"],
            )  # fmt: skip
            write_text(stage / CARD_NAME, card)
        write_text(stage / CONFIG_NAME, json.dumps(settings, indent=2) + "\n")
    return Written(out, len(specs), sum(map(_bytes, specs.values())), len(shards))


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "5GB", "500MB", "2GiB" or a plain number.

    Raises:
        UserError: the text is not a size.

    Example:
        >>> parse_size("1.5KB"), parse_size("2MiB")
        (1500, 2097152)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B)?", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size < 2**63:
        raise UserError(f"size {text!r}: wanted a number of bytes such as 5GB, 500MB or 2GiB")
    return int(size)


def _check_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; name a new folder", "already-exists")


def _token_ids(source: Source, tokenizer_dir: Path) -> dict[str, Any]:
    """Return the BOS, EOS and padding ids, if the source's settings name them.

    A run has them beside its tokenizer if the model it started from had them.
    """
    known = check_token_ids(source.settings, source.path / CONFIG_NAME)
    beside = tokenizer_dir / GENERATION_CONFIG_FILE
    if not known and beside.is_file():
        return check_token_ids(read_json(beside), beside)
    return known


def _take_tokenizer(source: Source, token_ids: dict[str, Any], tokenizer_dir: Path, stage: Path) -> dict[str, Any]:
    """Copy the tokenizer's files; return the BOS, EOS and padding ids for config.json."""
    for pattern in TOKENIZER_FILES:
        for file in filter(Path.is_file, tokenizer_dir.glob(pattern)):
            if file.suffix == ".json":
                # detect a damaged file now rather than at the first text
                read_json(file)
            copy = stage / file.relative_to(tokenizer_dir)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    if token_ids:
        return token_ids
    # a run trained from scratch names none: use those of our tokenizer, which transformers opens in another form
    try:
        tokenizer = load_tokenizer(stage)
    except UserError:
        # there is a tokenizer, but it is damaged
        if any(stage.glob("*tokenizer.json")):
            raise
        # without this, transformers would use the defaults of a class
        return {"bos_token_id": None, "eos_token_id": None}
    write_transformers_files(tokenizer, stage)
    return write_generation_config(tokenizer, source.config.vocab_size, stage)


def _bytes(spec: Tensor) -> int:
    return spec.numel() * spec.element_size()


def _shards(specs: Mapping[str, Tensor], limit: int | None) -> list[dict[str, Tensor]]:
    """Split the tensors, in order, into files below the limit; a larger tensor gets its own file."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, spec in specs.items():
        if limit is not None and shards[-1] and size + _bytes(spec) > limit:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += _bytes(spec)
    return shards


def _write_weights(
    source: Source, stage: Path, table: Table, specs: Mapping[str, Tensor], shards: list[dict[str, Tensor]]
) -> None:
    finite = FiniteCheck()

    def read(name: str) -> Tensor:
        return finite(name, stack([source.read(part) for part in table[name]]).to(specs[name].dtype))

    if len(shards) == 1:
        write_safetensors(stage / SAFETENSORS_NAME, shards[0], read)
    else:
        places = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(stage / file, shard, read)
            places |= dict.fromkeys(shard, file)
        total = {
            "total_size": sum(map(_bytes, specs.values())),
            "total_parameters": sum(spec.numel() for spec in specs.values()),
        }
        index = {"metadata": total, "weight_map": places}
        write_text(stage / f"{SAFETENSORS_NAME}.index.json", json.dumps(index, indent=2) + "\n")
    finite.warn(source.path)
