"""Which of our tensors lie in which tensors of a file: one table for reading, checking and writing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hgrn2.formats.reading import TensorSpec, name_some
from hgrn2.models import HGRN2LM, HGRN2Config

# a tensor of a file, to the tensors of ours whose rows it holds one below the other
Table = dict[str, tuple[str, ...]]

EMBEDDINGS, HEAD = "model.embeddings.weight", "lm_head.weight"


@dataclass(frozen=True)
class Rows:
    """Where one of our tensors lies: rows start to stop of a tensor of a file."""

    name: str
    start: int
    stop: int


def model_shapes(config: HGRN2Config) -> dict[str, torch.Size]:
    """Names and shapes of a model's tensors, a tied matrix once, without any memory for them."""
    with torch.device("meta"):
        model = HGRN2LM(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def with_tied_head(table: Table, names: Iterable[str]) -> Table:
    """The table of a file of a tied model, which may hold the one matrix under either name, or under both.

    Args:
        table: for the matrix under the embeddings' name.
        names: of the file's tensors.
    """
    if HEAD not in names:
        return table
    embeddings = next(name for name, own in table.items() if own == (EMBEDDINGS,))
    kept = table if embeddings in names else {name: own for name, own in table.items() if name != embeddings}
    return kept | {HEAD: (EMBEDDINGS,)}


def stacked_shape(own: tuple[str, ...], shapes: Mapping[str, torch.Size]) -> list[int]:
    """The shape of a tensor of a file that holds some of ours."""
    return [sum(shapes[name][0] for name in own), *shapes[own[0]][1:]]


def rows_of(table: Table, shapes: Mapping[str, torch.Size]) -> dict[str, Rows]:
    """Where each of our tensors lies in a file that fits the table; the first place, if there are two."""
    places: dict[str, Rows] = {}
    for name, own in table.items():
        start = 0
        for part in own:
            stop = start + shapes[part][0]
            places.setdefault(part, Rows(name, start, stop))
            start = stop
    return places


def stack(tensors: list[Tensor]) -> Tensor:
    """Some of our tensors as one of a file's; one alone is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


@dataclass(frozen=True)
class Misfits:
    """How the tensors of a file differ from those of a table."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.missing) + len(self.unexpected) + len(self.misshapen)

    def __str__(self) -> str:
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", self.misshapen))
        return "; ".join(f"{len(names)} {kind}: {name_some(names)}" for kind, names in kinds if names)


def misfits(table: Table, shapes: Mapping[str, torch.Size], found: Mapping[str, TensorSpec]) -> Misfits:
    """Compares a file with a table.

    Args:
        table: what the file should hold.
        shapes: of our tensors.
        found: the file's tensors.
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
