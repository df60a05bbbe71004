"""Files beside a model's tokenizer: start and end tokens, chat template, generation settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hgrn2.data.tokenizer import BYTES_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from hgrn2.errors import UserError
from hgrn2.storage.json_files import read_json_object

if TYPE_CHECKING:
    import tokenizers

GENERATION_CONFIG_FILE = "generation_config.json"
CONFIG_FILE = "config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# files that belong to a tokenizer, and the generation settings
TOKENIZER_FILES = (
    "*tokenizer*.json", "*.model", "tokenizer.model.*", "tekken.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template*", "additional_chat_templates/*.jinja",
    GENERATION_CONFIG_FILE,
)  # fmt: skip


@dataclass(frozen=True)
class ModelFiles:
    """Settings in a model's folder that say how its texts start and end.

    Attributes:
        eot: the EOS token of tokenizer_config.json; None if it names none.
        end_ids: ids that end generation, from generation_config.json or config.json.
        begins_as_template: texts begin as the template in tokenizer.json says. Otherwise they begin with the
            end-of-text token, as for models trained from scratch by this package.
    """

    eot: str | None
    end_ids: tuple[int, ...]
    begins_as_template: bool


def read_model_files(folder: Path) -> ModelFiles:
    """Read transformers' settings in a folder; without such files every setting is unset.

    Raises:
        UserError: a file cannot be read, or a token id in it is not a number.
    """
    tokenizer, generation, config = (
        _read(folder / name) for name in (TOKENIZER_CONFIG_FILE, GENERATION_CONFIG_FILE, CONFIG_FILE)
    )
    eot = tokenizer.get("eos_token")
    if isinstance(eot, dict):
        eot = eot.get("content")
    ids = check_token_ids(generation, folder / GENERATION_CONFIG_FILE)
    ids = {**check_token_ids(config, folder / CONFIG_FILE), **{k: v for k, v in ids.items() if v is not None}}
    ends = ids.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return ModelFiles(eot if isinstance(eot, str) else None, tuple(ends), bool(ids))


def check_token_ids(settings: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return the BOS, EOS and padding ids among some settings.

    Args:
        settings: the content of a config.json or generation_config.json.
        where: the file, for the message.

    Raises:
        UserError: an id is neither a number, nor a list of numbers, nor null.
    """
    found = {key: settings[key] for key in TOKEN_IDS if key in settings}
    for key, value in found.items():
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(token) is int for token in ids):
            raise UserError(f"{where}: {key} is {value!r}; wanted a whole number, a list of them, or null")
    return found


def template_start(backend: tokenizers.Tokenizer) -> list[int]:
    """Return the tokens that the tokenizer's own template puts before a text."""
    with_template = backend.encode("0", add_special_tokens=True)
    # special tokens after the text mark its end
    marks = with_template.special_tokens_mask
    return with_template.ids[: marks.index(0)] if 0 in marks else []


def companion_files(folder: Path) -> Iterator[Path]:
    """Yield the files in a model's folder that belong to its tokenizer, except tokenizer.json."""
    for pattern in TOKENIZER_FILES:
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file.name not in (TOKENIZER_FILE, BYTES_FILE):
                yield file


def read_companions(folder: Path, eot_id: int) -> dict[str, bytes]:
    """Read the companion files of a tokenizer.

    Args:
        folder: the folder of a model.
        eot_id: the end token if the folder names none.

    Returns:
        The contents by path relative to the folder. If there are any files, generation_config.json is among them,
        made from the token ids of the model if need be.
    """
    found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in companion_files(folder)}
    ids = check_token_ids(_read(folder / CONFIG_FILE), folder / CONFIG_FILE)
    if (ids or found) and GENERATION_CONFIG_FILE not in found:
        found[GENERATION_CONFIG_FILE] = (json.dumps(ids or {"eos_token_id": eot_id}, indent=2) + "\n").encode()
    return found


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file does not exist."""
    return read_json_object(path, "copy it again from where it came") if path.is_file() else {}
