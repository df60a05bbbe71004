"""A folder of any layout as our configuration and our tensors."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.formats import transformer
from hgrn2.formats.diagnose import describe_other_head
from hgrn2.formats.layout import Layout, recognise
from hgrn2.formats.reading import CONFIG_NAME, Weights, name_some, read_json
from hgrn2.formats.tables import EMBEDDINGS, Rows, Table, misfits, model_shapes, rows_of, with_tied_head
from hgrn2.models import HGRN2LM, HGRN2Config

_REPAIR = "take config.json and weights from the same model, whole"
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint of any layout; its tensors are read when they are asked for.

    Attributes:
        path: the folder.
        layout: which one it is of.
        settings: its config.json.
        config: our configuration.
        weights: the file's tensors.
        places: where in them each of ours lies, in the order of the model.
    """

    path: Path
    layout: Layout
    settings: dict[str, Any]
    config: HGRN2Config
    weights: Weights
    places: dict[str, Rows]

    @property
    def names(self) -> list[str]:
        """Our tensors, in the order of the model."""
        return list(self.places)

    def spec(self, name: str) -> Tensor:
        """One of our tensors on the meta device: its shape and the file's dtype."""
        place = self.places[name]
        found = self.weights.specs[place.name]
        shape = (place.stop - place.start, *found.shape[1:])
        assert isinstance(found.dtype, torch.dtype)
        return torch.empty(shape, dtype=found.dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """One of our tensors, in the file's dtype."""
        place = self.places[name]
        return self.weights.read(place.name, place.start, place.stop)

    @torch.no_grad()
    def load_into(self, model: HGRN2LM) -> None:
        """Copies the tensors into a model of this configuration, cast to its dtype, one at a time.

        Args:
            model: on any device but meta.

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
        """The model in float32, on a device, in evaluation mode."""
        with torch.device("meta"):
            model = HGRN2LM(self.config)
        model = model.to_empty(device=device)
        model.tie_weights()
        self.load_into(model)
        return model.eval()


class FiniteCheck:
    """Remembers which tensors had a value that is no finite number: worth a warning, but no reason to stop."""

    def __init__(self) -> None:
        self._found: list[str] = []

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor, looked at."""
        if not bool(tensor.isfinite().all()):
            self._found.append(name)
        return tensor

    def warn(self, where: Path) -> None:
        """Warns if there was one."""
        if self._found:
            warnings.warn(f"{where}: values that are not finite in {name_some(self._found)}", UserWarning, stacklevel=3)


def read_folder_config(path: Path, *, attends: bool = True) -> tuple[Layout, dict[str, Any], HGRN2Config]:
    """The layout of a folder's config.json, what is in it, and our configuration.

    Args:
        path: the folder.
        attends: see `open_folder`.

    Raises:
        UserError: no config.json there, or one that is not of a model of ours.
    """
    settings = read_json(path / CONFIG_NAME)
    try:
        layout = recognise(settings)
        used = settings if attends or layout.name != transformer.NAME else transformer.without_positions(settings)
        return layout, settings, layout.read_config(used)
    except UserError as error:
        raise UserError(f"{path / CONFIG_NAME}: {error}", error.code) from None


def open_folder(path: Path, *, attends: bool = True) -> ModelFolder:
    """Opens a checkpoint of any layout.

    Args:
        path: a folder with config.json and weights (see `Weights`).
        attends: False if a Transformer's attention is not to be computed: its positions and windows are not read then,
            may be any, and are the defaults in the configuration.

    Raises:
        UserError: its layout cannot be told, its settings are not those of a model of ours, or its tensors are not
            those that the settings ask for; what is missing, unexpected or misshapen is listed.
    """
    layout, settings, config = read_folder_config(path, attends=attends)
    weights = Weights(path)
    if config.num_hidden_layers > len(weights.specs):
        # every layer has tensors; a model of millions of layers would take hours to lay out
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
        raise UserError(
            f"{path}: not the tensors that its {CONFIG_NAME} (layout of {layout.title}) asks for: {wrong}; {_REPAIR}",
            "mismatch",
        )
    others = [f"{name} ({spec.dtype!s})" for name, spec in found.items() if spec.dtype not in _FLOATS]
    if others:
        raise UserError(
            f"{path}: tensors that are no floating-point numbers: {name_some(others)}; save them as floats",
            "unsupported",
        )
    _check_tied(table, weights)
    places = rows_of(table, shapes)
    return ModelFolder(path, layout, settings, config, weights, {name: places[name] for name in shapes})


def _check_tied(table: Table, weights: Weights) -> None:
    """A tied matrix that a file holds twice must be twice the same."""
    names = [name for name, own in table.items() if own == (EMBEDDINGS,)]
    # bit for bit, so that values that are no numbers equal themselves
    if len(names) == 2 and not torch.equal(*(weights.read(name).contiguous().view(torch.uint8) for name in names)):
        raise UserError(
            f"{weights.folder}: tie_word_embeddings is true, but {names[0]} and {names[1]} differ; "
            f"set it to false in {CONFIG_NAME} if the model was trained so",
            "contradiction",
        )
