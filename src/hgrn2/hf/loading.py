"""Check that a checkpoint opened by transformers is complete, except for the head of another class."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from hgrn2.errors import UserError
from hgrn2.formats.reading import CONFIG_NAME
from hgrn2.formats.tables import Misfits

# the class if a config.json names none, as in runs
_LANGUAGE_MODEL = "HGRN2ForCausalLM"
_CLASSES = ("HGRN2Model", _LANGUAGE_MODEL, "HGRN2ForSequenceClassification")
_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_INNER = ".mlp.gate_proj.weight"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint lacks tensors of the model or has other shapes; a RuntimeError, as in the library."""


def classes_named_by(name: Any, settings: Mapping[str, Any]) -> list[str] | None:
    """Return the classes named by the config.json of a folder or repository.

    Args:
        name: folder or repository, as in `from_pretrained`.
        settings: further arguments of `from_pretrained`, of which those about the Hub are used.
    """
    if name is None:
        return None
    try:
        found, _ = PreTrainedConfig.get_config_dict(name, **{key: settings[key] for key in _HUB if key in settings})
    except OSError:
        # only tensors; the configuration was given as an argument
        return None
    return found.get("architectures")


def check_loaded(
    where: Any, found: Mapping[str, Iterable[Any]], *, opened_by: Sequence[str], written_by: Sequence[str] | None,
    body: str, any_missing: bool, any_size: bool,
) -> None:  # fmt: skip
    """Refuse a checkpoint that would leave parameters at random values.

    A head is initialised at random, with a warning of the library, if another class wrote the file: that of a
    classifier opened from a language model, or that of a language model opened from the model without a head.

    Args:
        where: the folder or name, for messages.
        found: the library's report: "missing_keys" by name, "mismatched_keys" with the file's shape and the model's.
        opened_by: names of the class and its base classes.
        written_by: names of classes in config.json; None if it has none.
        body: prefix of the names of tensors below the head; empty for the model without a head.
        any_missing: whether missing tensors may be initialised at random, as the caller gets the report or has no file.
        any_size: whether tensors of other shapes may be.

    Raises:
        CheckpointError: tensors are missing or have other shapes; the message lists them and suggests a remedy.
    """
    # ignore class names of other projects
    ours = [name for name in written_by or () if name in _CLASSES] or [_LANGUAGE_MODEL]
    head_is_new = set(opened_by).isdisjoint(ours)
    missing = sorted(name for name in found["missing_keys"] if name.startswith(body) or not head_is_new)
    missing = [] if any_missing else missing
    misshapen = [] if any_size else sorted(found["mismatched_keys"])
    if not missing and not misshapen:
        return
    shapes = [f"{name} {list(shape)}, wanted {list(wanted)}" for name, shape, wanted in misshapen]
    if any(name.endswith(_INNER) and shape[0] == 2 * wanted[0] for name, shape, wanted in misshapen):
        # a model on the Hub must be downloaded first
        folder = shlex.quote(str(where)) if Path(str(where)).is_dir() else "FOLDER"
        hint = (
            "a file of fla from before February 2025, which holds gate_proj and up_proj in one: bring it into today's "
            f"form with `hgrn2 convert {folder} OUT --to hf`"
        )
    else:
        ask = "output_loading_info=True, and read what it returns" if missing else "ignore_mismatched_sizes=True"
        hint = f"use the files of one model, whole; to have them drawn anew on purpose, give {ask}"
    raise CheckpointError(
        f"{where}: not the tensors that its {CONFIG_NAME} asks for: {Misfits(missing, [], shapes)}; {hint}", "mismatch"
    )
