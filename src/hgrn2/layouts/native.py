"""Settings in our own words: those of a run, and those that our transformers classes save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hgrn2.errors import UserError
from hgrn2.layouts.keys import check_keys
from hgrn2.layouts.tables import Table
from hgrn2.models import HGRN2Config

_KEYS = tuple(field.name for field in dataclasses.fields(HGRN2Config))
# keys that only our files have, and by which they are known
SIGNATURE = (
    "glu_activation", "lower_bound", "q_activation", "v_activation", "scale", "mixer_norm", "mixer_norm_eps",
    "mixer_norm_affine", "block_norm", "use_bias", "scale_embedding", "min_log_decay", "dropout",
)  # fmt: skip
# the table of a run's config.json that holds the model's settings
TABLE = "model"


def read_run_config(values: Mapping[str, Any]) -> HGRN2Config:
    """The config.json of a run: the model's settings are one of its tables.

    Raises:
        UserError: an unknown key, values that contradict each other, or others beside the table that contradict it.
    """
    model = values[TABLE]
    config = HGRN2Config.from_dict(model)
    for key in _KEYS:
        if key in values and values[key] != model.get(key):
            raise UserError(
                f"config.json: {key} is {values[key]!r}, but {model.get(key)!r} in {TABLE!r}; leave one of them out"
            )
    return config


def read_config(values: Mapping[str, Any]) -> HGRN2Config:
    """The config.json of our transformers classes: our keys beside transformers' own.

    Raises:
        UserError: an unknown key, or values that contradict each other.
    """
    return HGRN2Config.from_dict(check_keys(values, "hgrn2 config", _KEYS))


def write_run_config(config: HGRN2Config) -> dict[str, Any]:
    """The inverse of `read_run_config`."""
    return {TABLE: config.to_dict()}


def write_config(config: HGRN2Config) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return config.to_dict()


def tables(config: HGRN2Config, names: Sequence[str]) -> tuple[Table, ...]:
    """Every tensor under its own name."""
    del config
    return ({name: (name,) for name in names},)
