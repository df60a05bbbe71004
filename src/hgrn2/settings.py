"""From what a person types to configurations, data and models: the part of the command line that is not parsing."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hgrn2.data.model_files import read_companions
from hgrn2.data.prepare import prepare
from hgrn2.data.prepared import PreparedData, is_prepared
from hgrn2.data.progress import announce
from hgrn2.data.tokenizer import HFTokenizer, Tokenizer
from hgrn2.errors import UserError, unknown_key_message
from hgrn2.extras import install_command
from hgrn2.formats.convert import Source, Written, convert, parse_size
from hgrn2.formats.mistaken import check_place
from hgrn2.formats.opening import ModelFolder, open_folder, read_folder_config
from hgrn2.formats.start import parse_layers, start_from_transformer
from hgrn2.loading import LoadedModel, load
from hgrn2.models import HGRN2Config, presets
from hgrn2.storage.json_files import parse_json, read_json_object
from hgrn2.train.checkpoint import locate_model, read_config, read_while_training, resume_point
from hgrn2.train.places import from_saved_path
from hgrn2.train.run import check_same_tokens, find_tokenizer


def read_toml(path: Path | None) -> dict[str, dict[str, Any]]:
    """The tables [model], [train] and [data] of a file; empty ones without a file or where it has none."""
    tables: dict[str, dict[str, Any]] = {"model": {}, "train": {}, "data": {}}
    if path is None:
        return tables
    try:
        with path.open("rb") as file:
            found = tomllib.load(file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a TOML file") from None
    except (ValueError, RecursionError) as error:
        # not TOML, not UTF-8, a number of thousands of digits, or tables nested as deep
        raise UserError(f"{path}: not TOML ({error}); see docs/guide/training.md") from None
    for key, value in found.items():
        if key not in tables:
            raise UserError(unknown_key_message(str(path), key, tables))
        if not isinstance(value, dict):
            raise UserError(f"{path}: {key} is {value!r}; wanted a table, [{key}]")
    return tables | found


_DATA_KEYS = {
    "data": ["stdlib"],
    "validation": [],
    "text_field": "text",
    "tokenizer": "bpe:4096",
    "prepared": None,
}


def data_settings(file: dict[str, Any], **flags: Any) -> dict[str, Any]:
    """Return what to read and how: defaults, over them the file's [data], over that the flags that were given.

    The file's validation goes with the file's data, and is left out when other data is given.
    """
    for key, value in file.items():
        if key not in _DATA_KEYS:
            raise UserError(unknown_key_message("data config", key, _DATA_KEYS))
        several = isinstance(_DATA_KEYS[key], list)
        names = value if several and isinstance(value, list) else [value]
        if not all(isinstance(name, str) for name in names):
            raise UserError(f"data config: {key} is {value!r}; wanted a text{' or a list of texts' if several else ''}")
        file = file | {key: names if several else value}
    if flags.get("data") and not flags.get("validation") and (dropped := file.get("validation")):
        file = file | {"validation": []}
        announce(f"validation {', '.join(dropped)} goes with the data of the file, not with --data; left out")
    found = _DATA_KEYS | file | {key: value for key, value in flags.items() if value not in (None, [])}
    for key, value in found.items():
        # an empty path would mean the current folder, and no path has a null character
        names = value if isinstance(value, list) else [value]
        if any(name is not None and (not name or "\0" in name) for name in names):
            raise UserError(
                f"data config: {key} is {value!r}; wanted a text that is not empty, without null characters"
            )
    return found


def prepare_data(
    sources: dict[str, Any], out: Path, rebuild: bool, check_tokenizer: Callable[[Tokenizer], None]
) -> tuple[PreparedData, dict[str, Any]]:
    """Prepared tokens, made or reused, and what a run must remember to open them again.

    Args:
        sources: as `data_settings` gives them.
        out: the run's folder, beside which the tokens are kept by default.
        rebuild: prepare even if nothing has changed.
        check_tokenizer: see `prepare`.
    """
    names = sources["data"]
    if len(names) == 1 and names[0] and is_prepared(names[0]):
        for key in ("validation", "text_field", "tokenizer", "prepared"):
            if sources[key] != _DATA_KEYS[key]:
                raise UserError(f"data {names[0]!r} is prepared already; drop {key}, or name what it was prepared from")
        # the run may be resumed from another folder
        prepared = PreparedData.open(os.path.abspath(names[0]))
        return prepared, {"prepared": str(prepared.directory)}
    target = sources["prepared"]
    if target is None:
        key = json.dumps([names, sources["validation"], sources["text_field"], sources["tokenizer"]])
        first = "".join(c if c.isalnum() else "-" for c in Path(names[0]).name)[:24]
        target = out.parent / "prepared" / f"{first}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    prepared = prepare(
        names, sources["tokenizer"], target, validation=sources["validation"], text_field=sources["text_field"],
        rebuild=rebuild, check_tokenizer=check_tokenizer,
    )  # fmt: skip
    announce(f"{'reusing' if prepared.reused else 'prepared'} {prepared.directory}: {prepared.summary()}")
    return prepared, {
        "prepared": str(prepared.directory),
        **{k: v for k, v in sources.items() if k != "prepared"},
    }


def open_prepared(run: Path, prepared: Path | None = None, data: Sequence[str] = ()) -> PreparedData:
    """Open the prepared tokens a run was started with.

    Args:
        run: a run folder, or one of its checkpoints.
        prepared: where the tokens are now; by default where the run remembers them.
        data: the text they were made from, wherever it lies now, to prepare again with the run's own tokenizer.

    Raises:
        UserError: there are no tokens, or they are damaged. Whether they are the run's is known when it is resumed.
    """
    folder = resume_point(run)[0]
    settings = read_config(folder).get("data")
    if not isinstance(settings, dict):
        settings = {}
    if data:
        # the split, the field and the rest are those of the run
        own = {key: settings[key] for key in ("validation", "text_field") if key in settings}
        named = data_settings(
            own, data=list(data), tokenizer=str(folder), prepared=None if prepared is None else str(prepared)
        )
        return prepare_data(named, folder, False, lambda _: None)[0]
    if prepared is not None:
        return PreparedData.open(prepared)
    was_at = settings.get("run_was_at")
    if not isinstance(settings.get("prepared"), str) or not isinstance(was_at, str | None):
        raise UserError(
            f"{folder}: config.json does not say where the prepared data is; restore it from a checkpoint, or name the "
            "data with --prepared"
        )
    place = from_saved_path(folder, settings["prepared"], was_at)
    if not place.exists():
        raise UserError(
            f"{place}: the prepared tokens of {folder} are not there; name their place with --prepared, or the text "
            "they were made from with --data"
        )
    return PreparedData.open(place)


def model_config(
    model: str | None, file: dict[str, Any], changes: Sequence[str], vocab_size: int | None
) -> HGRN2Config:
    """A preset, or the configuration in a file or run, with changes; the tokenizer sets the vocabulary by default."""
    keys = dict(file)
    preset = keys.pop("preset", "tiny")
    model = str(preset) if model is None else model
    for change in changes:
        key, sign, value = change.partition("=")
        if not (key and sign):
            raise UserError(f"--set {change}: wanted KEY=VALUE")
        try:
            keys[key] = parse_json(value)
        except ValueError as error:
            # a word needs no quotes; what begins as JSON does is meant to be JSON
            if value.lstrip()[:1] in ("[", "{") or value.isdecimal():
                raise UserError(f"--set {key}: not JSON ({error}); wanted a setting of a model") from None
            keys[key] = value
    if not model:
        raise UserError("model '': names nothing; name a preset, a file or a folder")
    if model in presets.PRESETS:
        if vocab_size is not None:
            keys = {"vocab_size": vocab_size} | keys
        return presets.preset(model, **keys)
    path = Path(model)
    check_place(path)
    if path.is_dir():
        found = read_folder_config(path)[2].to_dict()
    elif path.is_file():
        found = read_json_object(path, "name a JSON file with a model's settings")
    else:
        near = difflib.get_close_matches(model, presets.PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"presets are {', '.join(presets.PRESETS)}"
        raise UserError(f"model {model!r}: no such preset, file or folder; {hint}")
    config = HGRN2Config.from_dict(
        {"vocab_size": vocab_size} | found if vocab_size and "vocab_size" not in found else found
    )
    return config.replace(**keys) if keys else config


def load_model(run: str | Path, which: str = "latest", device: str = "auto") -> LoadedModel:
    """Opens a trained model and its tokenizer; see `hgrn2.load`.

    Args:
        run: a run folder, a checkpoint, or a folder of any layout that holds the tokenizer as well.
        which: "latest" or "best" checkpoint of a run.
        device: "auto", "cpu", "cuda", ...
    """
    return load(run, which, device)


def evaluate_tasks(
    run: Path, names: Sequence[str], *, tasks_dir: Path | None, batch_size: str, num_fewshot: int | None,
    limit: int | None, which: str, device: str,
) -> tuple[str, str]:  # fmt: skip
    """Runs tasks of lm-evaluation-harness.

    Args:
        run: as for load_model.
        names: of tasks and of task files; several may stand in one word, with commas between them.
        tasks_dir: a folder of further task files.
        batch_size: a number or "auto".
        num_fewshot: solved examples before each question; None leaves it to the task.
        limit: most questions of a task; None for all.
        which: as for load_model, like device.
        device: see which.

    Returns:
        A table for people and the harness's JSON.

    Raises:
        UserError: a number out of range, an extra that is not installed, no such task, data that is not there.
    """
    words = [name if Path(name).exists() else name.split(",") for name in names]
    names = [name.strip() for word in words for name in ([word] if isinstance(word, str) else word) if name.strip()]
    # nine digits are more than any memory holds, and int() refuses thousands
    if batch_size != "auto" and not (batch_size.isdecimal() and len(batch_size) < 10 and int(batch_size) > 0):
        raise UserError(f"--batch-size is {batch_size}; wanted a number from 1 to 999999999, or auto")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num-fewshot is {num_fewshot}; wanted at least 0")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; wanted at least 1")
    try:
        from hgrn2.evaluation import harness
    except ModuleNotFoundError as missing:
        raise UserError(f"--tasks needs {missing.name}, which is not installed: {install_command('eval')}") from None
    weights, folder = read_while_training(run, lambda: locate_model(run, which))
    tasks = harness.open_tasks(names, tasks_dir)
    model, tokenizer = harness.open_for_transformers(*load_model(run, which, device), folder)
    # as the results name it
    model.config.name_or_path = str(weights)
    lm = harness.HGRN2Harness(model, tokenizer, batch_size)
    results = harness.evaluate_tasks(lm, tasks, num_fewshot=num_fewshot, limit=limit)
    return harness.results_table(results), harness.results_json(results)


@dataclasses.dataclass(frozen=True)
class Start:
    """A model whose weights a new run begins with.

    Attributes:
        model: the model.
        tokenizer: beside it; None if there is none.
        tokenizer_dir: where that lies.
    """

    model: ModelFolder
    tokenizer: Tokenizer | None
    tokenizer_dir: Path

    @classmethod
    def open(cls, path: Path) -> Start:
        """From a run folder, a checkpoint, or a folder of any layout."""

        def read() -> Start:
            folder, tokenizer_dir = locate_model(path)
            tokenizer = find_tokenizer(tokenizer_dir)
            if isinstance(tokenizer, HFTokenizer):
                # chat template, special tokens and settings of generation go with the model
                tokenizer.companions = read_companions(tokenizer_dir, tokenizer.eot_id)
            return cls(open_folder(folder), tokenizer, tokenizer_dir)

        return read_while_training(path, read)

    def data_defaults(self, names: Sequence[str]) -> dict[str, Any]:
        """Return defaults for `data_settings`: data that is not prepared yet gets the model's tokenizer."""
        prepared_already = len(names) == 1 and is_prepared(names[0])
        return {} if self.tokenizer is None or prepared_already else {"tokenizer": str(self.tokenizer_dir)}

    def own_tokenizer(self, data: PreparedData) -> PreparedData:
        """The data with the model's tokenizer, which knows more of the model than the one kept with the tokens."""
        return data if self.tokenizer is None else dataclasses.replace(data, tokenizer=self.tokenizer)

    def check_tokens(self, found: Tokenizer) -> None:
        """Raises UserError if the data is in other tokens than the model's."""
        check_same_tokens(self.tokenizer, found, f"model {self.model.path}")


@dataclasses.dataclass(frozen=True)
class StartSettings:
    """Settings for replacing a Transformer's attention by recurrent layers, as on the command line.

    Attributes:
        keep_attention: see `parse_layers`; None for no layer.
        expand_ratio: see `start_from_transformer`, likewise copy_qv and seed.
        copy_qv: see expand_ratio.
        seed: see expand_ratio.
    """

    keep_attention: str | None = None
    expand_ratio: int | None = None
    copy_qv: bool = False
    seed: int = 0


def convert_model(
    source: Path, out: Path, to: str, dtype: str, max_shard_size: str, which: str, start: StartSettings | None = None
) -> Written:
    """Writes a model in another layout.

    Args:
        source: a run folder, a checkpoint, or a folder of any layout.
        out: a folder that does not exist yet.
        to: a name in `hgrn2.formats.layout.LAYOUTS`.
        dtype: "same", or torch's name of one.
        max_shard_size: see `parse_size`.
        which: "latest" or "best" checkpoint of a run.
        start: put recurrent layers into a Transformer; None to write the model as it is.
    """
    max_shard_bytes = parse_size(max_shard_size)

    def read_and_write() -> Written:
        folder, tokenizer_dir = locate_model(source, which)
        # layers that are kept have their positions read when it is known which they are
        opened = open_folder(folder, attends=start is None)
        model: Source = opened
        if start is not None:
            model = start_from_transformer(
                opened, keep_attention=parse_layers(start.keep_attention or "none", opened.config.num_hidden_layers),
                expand_ratio=start.expand_ratio, copy_qv=start.copy_qv, seed=start.seed,
            )  # fmt: skip
        return convert(
            model, out, to, tokenizer_dir=tokenizer_dir,
            dtype=None if dtype == "same" else getattr(torch, dtype), max_shard_bytes=max_shard_bytes,
        )  # fmt: skip

    return read_while_training(source, read_and_write)
