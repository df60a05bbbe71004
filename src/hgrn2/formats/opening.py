"""Open a folder of any layout as our configuration and tensors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.formats import native, transformer
from hgrn2.formats.diagnose import describe_other_head
from hgrn2.formats.layout import Layout, recognise
from hgrn2.formats.reading import CONFIG_NAME, Weights, name_some, read_json
from hgrn2.formats.tables import EMBEDDINGS, Rows, Table, misfits, model_shapes, rows_of, with_tied_head
from hgrn2.models import HGRN2LM, HGRN2Config

_REPAIR = "take config.json and weights from the same model, whole"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint of any layout; tensors are read on demand.

    Attributes:
        path: the folder.
        layout: its layout.
        settings: the content of its config.json.
        config: our configuration.
        weights: the tensors of the files.
        places: location of each of our tensors in them, in the order of the model.
    """

    path: Path
    layout: Layout
    settings: dict[str, Any]
    config: HGRN2Config
    weights: Weights
    places: dict[str, Rows]

    @property
    def names(self) -> list[str]:
        """Names of our tensors, in the order of the model."""
        return list(self.places)

    def spec(self, name: str) -> Tensor:
        """Return one of our tensors as a meta tensor with the file's dtype."""
        place = self.places[name]
        found = self.weights.specs[place.name]
        shape = (place.stop - place.start, *found.shape[1:])
        assert isinstance(found.dtype, torch.dtype)
        return torch.empty(shape, dtype=found.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """Read one of our tensors, in the file's dtype."""
        place = self.places[name]
        return self.weights.read(place.name, place.start, place.stop)

    @torch.no_grad()
    def load_into(self, model: HGRN2LM) -> None:
        """Copy the tensors into a model of this configuration, one at a time, cast to its dtype.

        Args:
            model: the model, on any device except meta.

        Raises:
            UserError: the model's tensors have other names or shapes.
        """
        wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
        found = {name: self.spec(name).shape for name in self.names}
        if differing := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
            raise UserError(
                f"{self.path}: its weights do not fit the model in {name_some(differing)}; "
                "leave settings that decide about shapes as they are",
                "mismatch",
            )
        finite = FiniteCheck()
        for name, parameter in model.named_parameters():
            parameter.copy_(finite(name, self.read(name)))
        finite.warn(self.path)

    def load(self, device: torch.device) -> HGRN2LM:
        """Return the model in float32 on a device, in evaluation mode."""
        with torch.device("meta"):
            model = HGRN2LM(self.config)
        model = model.to_empty(device=device)
        model.tie_weights()
        self.load_into(model)
        return model.eval()


class FiniteCheck:
    """Collect the names of tensors with values that are not finite, for a warning."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Check a tensor and return it."""
        if not bool(tensor.isfinite().all()):
            self._found.append(name)
        return tensor

    def warn(self, where: Path) -> None:
        """Warn if any tensor had such values."""
        if self._found:
            warnings.warn(f"{where}: values that are not finite in {name_some(self._found)}", UserWarning, stacklevel=3)


def read_folder_config(path: Path, *, attends: bool = True) -> tuple[Layout, dict[str, Any], HGRN2Config]:
    """Return the layout of a folder's config.json, its content, and our configuration.

    Args:
        path: the folder.
        attends: False ignores the positions and windows of a Transformer's attention.

    Raises:
        UserError: config.json is missing, or our models cannot represent it.
    """
    settings = read_json(path / CONFIG_NAME)
    try:
        layout = recognise(settings)
        used = settings if attends or layout.name != transformer.NAME else transformer.without_positions(settings)
        return layout, settings, layout.read_config(used)
    except UserError as error:
        raise UserError(f"{path / CONFIG_NAME}: {error}", error.code) from None


def open_folder(path: Path, *, attends: bool = True) -> ModelFolder:
    """Open a checkpoint of any layout.

    Args:
        path: a folder with config.json and weights, as described for `Weights`.
        attends: False if a Transformer's attention will not be computed. Its positions and windows are then ignored and
            the configuration has defaults for them.

    Raises:
        UserError: the layout cannot be recognised, our models cannot represent the settings, or the tensors do not
            match the settings; the message lists missing, unexpected and misshapen ones.
    """
    layout, settings, config = read_folder_config(path, attends=attends)
    weights = Weights(path)
    if config.num_hidden_layers > len(weights.specs):
        # every layer has tensors; a model with millions of layers would take hours to build
        raise UserError(
            f"{path}: {CONFIG_NAME} asks for {config.num_hidden_layers} layers; "
            f"the files hold {len(weights.specs)} tensors; {_REPAIR}",
            "mismatch",
        )
    shapes = model_shapes(config)
    tables = layout.tables(config, list(shapes))
    if config.tie_word_embeddings:
        tables = tuple(with_tied_head(table, weights.specs) for table in tables)
    found = {name: spec for name, spec in weights.specs.items() if not name.endswith(layout.derived)}
    tried = [(misfits(table, shapes, found), table) for table in tables]
    wrong, table = min(tried, key=lambda pair: pair[0].count)
    if wrong.count:
        for table in tables:
            if other := describe_other_head(path, found, table):
                raise UserError(f"{path}: {other}", "unsupported")
        if (task := native.task_name(settings)) is not None:
            raise UserError(
                f"{path}: a run of task {task!r}, whose model is not a language model: {wrong}; "
                "hgrn2.train.run.evaluate_run and hgrn2 train --resume open it",
                "unsupported",
            )
        raise UserError(
            f"{path}: not the tensors that its {CONFIG_NAME} (layout of {layout.title}) asks for: {wrong}; {_REPAIR}",
            "mismatch",
        )
    others = [f"{name} ({spec.dtype!s})" for name, spec in found.items() if spec.dtype not in _FLOATS]
    if others:
        raise UserError(
            f"{path}: tensors that are not floating-point numbers: {name_some(others)}; save them as floats",
            "unsupported",
        )
    _check_tied(table, weights)
    places = rows_of(table, shapes)
    return ModelFolder(path, layout, settings, config, weights, {name: places[name] for name in shapes})


def _check_tied(table: Table, weights: Weights) -> None:
    """Refuse a file that holds a tied matrix twice with different values."""
    names = [name for name, own in table.items() if own == (EMBEDDINGS,)]
    # compare bits, so that NaN equals NaN
    if len(names) == 2 and not torch.equal(*(weights.read(name).contiguous().view(torch.uint8) for name in names)):
        raise UserError(
            f"{weights.folder}: tie_word_embeddings is true, but {names[0]} and {names[1]} differ; "
            f"set it to false in {CONFIG_NAME} if the model was trained so",
            "contradiction",
        )
