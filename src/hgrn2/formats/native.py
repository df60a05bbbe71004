"""Our own layouts: the settings of a run, and those that our transformers classes save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hgrn2.errors import UserError
from hgrn2.formats.keys import check_keys
from hgrn2.formats.tables import Table
from hgrn2.models import HGRN2Config
from hgrn2.models.config import MODEL_TYPE
from hgrn2.storage.json_files import DIGEST_KEY, check_digest

_KEYS = tuple(field.name for field in dataclasses.fields(HGRN2Config))
# keys that only our files have
SIGNATURE = (
    "glu_activation", "lower_bound", "q_activation", "v_activation", "scale", "mixer_norm", "mixer_norm_eps",
    "mixer_norm_affine", "block_norm", "use_bias", "scale_embedding", "min_log_decay", "dropout",
)  # fmt: skip
# tables of a run's config.json, in their order: settings of the model, of training, of the task, and of the data
TABLE = "model"
TRAIN_TABLE = "train"
TASK_TABLE = "task"
# the task whose models are image models
IMAGE_TASK = "image"
RUN_TABLES = (TABLE, TRAIN_TABLE, TASK_TABLE, "data")


def read_run_config(values: Mapping[str, Any]) -> HGRN2Config:
    """Read the config.json of a run, in which the model's settings are a table.

    Raises:
        UserError: an unknown key, contradicting values, settings outside the table, or a digest that does not match.
    """
    if DIGEST_KEY in values:
        # transformers may have added keys
        covered = {key: values[key] for key in (*RUN_TABLES, DIGEST_KEY) if key in values}
        check_digest(covered, "config of a run", "restore it from a copy; training settings are changed with flags")
        values = {key: value for key, value in values.items() if key != DIGEST_KEY}
    mixed = [key for key in _KEYS if key in values]
    if mixed:
        raise UserError(
            f"{', '.join(mixed)} beside the table {TABLE!r}; put all settings of the model into the table",
            "contradiction",
        )
    if task_name(values) == IMAGE_TASK:
        raise UserError(
            "the model of a run on images, which is no language model; open RUN/model with "
            "hgrn2.models.vision.load_model",
            "unsupported",
        )
    return HGRN2Config.from_dict(check_keys(values, "config of a run", RUN_TABLES)[TABLE])


def read_config(values: Mapping[str, Any]) -> HGRN2Config:
    """Read the config.json of our transformers classes, which has our keys beside transformers' own.

    Raises:
        UserError: an unknown key, or contradicting values.
    """
    return HGRN2Config.from_dict(check_keys(values, "hgrn2 config", _KEYS))


def task_name(settings: Mapping[str, Any]) -> str | None:
    """Return the name of a run's task from its config.json; None for tasks on text, which have no table there."""
    table = settings.get(TASK_TABLE)
    name = table.get("name") if isinstance(table, Mapping) else None
    return name if isinstance(name, str) else None


def write_run_config(config: HGRN2Config) -> dict[str, Any]:
    """Invert `read_run_config`; adds the model type, which transformers looks for."""
    return {"model_type": MODEL_TYPE, TABLE: config.to_dict()}


def write_config(config: HGRN2Config) -> dict[str, Any]:
    """Invert `read_config`."""
    return config.to_dict()


def tables(config: HGRN2Config, names: Sequence[str]) -> tuple[Table, ...]:
    """Return the identity table: every tensor has its own name."""
    del config
    return ({name: (name,) for name in names},)
