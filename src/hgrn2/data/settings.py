"""From the settings of data (`[data]` of a file, flags) to prepared tokens."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hgrn2.data.prepare import prepare
from hgrn2.data.prepared import PreparedData, is_prepared
from hgrn2.data.progress import announce
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError, unknown_key_message

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
    """Prepare or reuse tokens; return them, and the settings with which a resumed run opens them again.

    Args:
        sources: settings of the data, from `data_settings`.
        out: folder of the run, next to which the tokens are stored by default.
        rebuild: prepare even if nothing has changed.
        check_tokenizer: called with the tokenizer before the corpus is tokenised; if it raises, nothing is written.
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
