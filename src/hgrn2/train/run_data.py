"""Open the prepared tokens that a run was started with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hgrn2.data.prepared import PreparedData
from hgrn2.data.settings import data_settings, prepare_data
from hgrn2.errors import UserError
from hgrn2.formats.run_folder import read_config, resume_point
from hgrn2.train.places import from_saved_path


def open_prepared(run: Path, prepared: Path | None = None, data: Sequence[str] = ()) -> PreparedData:
    """Open the prepared tokens a run was started with.

    Args:
        run: a run folder, or one of its checkpoints.
        prepared: current folder of the tokens; None means the one saved in config.json.
        data: the text the tokens were made from, to prepare it again with the run's own tokenizer.

    Raises:
        UserError: there are no tokens, or they are damaged. Resuming checks that they are the run's.
    """
    folder = resume_point(run)[0]
    settings = read_config(folder).get("data")
    if not isinstance(settings, dict):
        settings = {}
    if data:
        # take validation data and text field from the run
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
            "data with --prepared",
            "damaged",
        )
    place = from_saved_path(folder, settings["prepared"], was_at)
    if not place.exists():
        raise UserError(
            f"{place}: the prepared tokens of {folder} are not there; name their folder with --prepared, or the text "
            "they were made from with --data",
            "not-found",
        )
    return PreparedData.open(place)
