"""Build a model's configuration from a preset, a file or a folder, with changes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hgrn2.cli.key_values import parse_key_values
from hgrn2.errors import UserError
from hgrn2.formats.diagnose import check_is_model
from hgrn2.formats.opening import read_folder_config
from hgrn2.models import HGRN2Config, presets
from hgrn2.storage.json_files import read_json_object


def model_config(
    model: str | None, file: dict[str, Any], changes: Sequence[str], vocab_size: int | None
) -> HGRN2Config:
    """Return the configuration of a preset, a file or a run, with changes.

    Args:
        model: a preset, a file or a folder; None means the preset in `file`, or tiny.
        file: table [model] of the configuration file.
        changes: settings of the form KEY=VALUE, which override the file.
        vocab_size: default vocabulary size, from the tokenizer or the task.
    """
    keys = dict(file)
    preset = keys.pop("preset", "tiny")
    model = str(preset) if model is None else model
    keys |= parse_key_values(changes, "--set", "a setting of a model")
    if not model:
        raise UserError("model '': names nothing; name a preset, a file or a folder")
    if model in presets.PRESETS:
        if vocab_size is not None:
            keys = {"vocab_size": vocab_size} | keys
        return presets.preset(model, **keys)
    path = Path(model)
    check_is_model(path)
    if path.is_dir():
        found = read_folder_config(path)[2].to_dict()
    elif path.is_file():
        found = read_json_object(path, "name a JSON file with a model's settings")
    else:
        near = difflib.get_close_matches(model, presets.PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"presets are {', '.join(presets.PRESETS)}"
        raise UserError(f"model {model!r}: no such preset, file or folder; {hint}", "unknown-name")
    config = HGRN2Config.from_dict(
        {"vocab_size": vocab_size} | found if vocab_size and "vocab_size" not in found else found
    )
    return config.replace(**keys) if keys else config
