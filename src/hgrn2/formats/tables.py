"""Tables that map the tensors of a file to ours: one table for reading, checking and writing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hgrn2.formats.reading import TensorSpec, name_some
from hgrn2.models import HGRN2LM, HGRN2Config

# maps a tensor of a file to those of our tensors whose rows it stacks
Table = dict[str, tuple[str, ...]]

EMBEDDINGS, HEAD = "model.embeddings.weight", "lm_head.weight"


@dataclass(frozen=True)
class Rows:
    """Location of one of our tensors: rows [start, stop) of a tensor of a file."""

    name: str
    start: int
    stop: int


def model_shapes(config: HGRN2Config) -> dict[str, torch.Size]:
    """Return names and shapes of a model's tensors without allocating them; a tied matrix counts once."""
    with torch.device("meta"):
        model = HGRN2LM(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def with_tied_head(table: Table, names: Iterable[str]) -> Table:
    """Return the table for a file of a tied model, which may name the shared matrix as embeddings, head or both.

    Args:
        table: the table with the matrix named as embeddings.
        names: names of the file's tensors.
    """
    if HEAD not in names:
        return table
    embeddings = next(name for name, own in table.items() if own == (EMBEDDINGS,))
    kept = table if embeddings in names else {name: own for name, own in table.items() if name != embeddings}
    return kept | {HEAD: (EMBEDDINGS,)}


def stacked_shape(own: tuple[str, ...], shapes: Mapping[str, torch.Size]) -> list[int]:
    """Return the shape of a tensor of a file that stacks some of ours."""
    return [sum(shapes[name][0] for name in own), *shapes[own[0]][1:]]


def rows_of(table: Table, shapes: Mapping[str, torch.Size]) -> dict[str, Rows]:
    """Return the location of each of our tensors in a file that matches the table; the first, if there are two."""
    places: dict[str, Rows] = {}
    for name, own in table.items():
        start = 0
        for part in own:
            stop = start + shapes[part][0]
            places.setdefault(part, Rows(name, start, stop))
            start = stop
    return places


def stack(tensors: list[Tensor]) -> Tensor:
    """Stack some of our tensors to one of a file's; a single tensor is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass(frozen=True)
class Misfits:
    """Differences between the tensors of a file and a table."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def count(self) -> int:
        """Number of differences."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen))
        return "; ".join(f"{len(names)} {kind}: {name_some(names)}" for kind, names in kinds if names)


def misfits(table: Table, shapes: Mapping[str, torch.Size], found: Mapping[str, TensorSpec]) -> Misfits:
    """Compare a file with a table.

    Args:
        table: the expected tensors.
        shapes: shapes of our tensors.
        found: the tensors of the file.
    """
    wanted = {name: stacked_shape(own, shapes) for name, own in table.items()}
    return Misfits(
        missing=[name for name in wanted if name not in found],
        unexpected=[name for name in found if name not in wanted],
        misshapen=[
            f"{name} {list(found[name].shape)}, wanted {shape}"
            for name, shape in wanted.items()
            if name in found and list(found[name].shape) != shape
        ],
    )
