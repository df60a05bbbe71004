"""Byte-level text classification (IMDB), and retrieval of papers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from hgrn2.constraints import Ge, Le
from hgrn2.data.lra.sequences import LabelledSequences
from hgrn2.data.lra.text import read_pairs, read_reviews
from hgrn2.errors import UserError
from hgrn2.tasks.lra.base import LRAOptions, LRATask
from hgrn2.tasks.registry import register_task


@dataclass(frozen=True)
class TextOptions(LRAOptions):
    """Options of the classification of reviews."""

    what = "task 'lra-text'"
    paths = ("data",)

    data: str = "data/imdb"
    """Folder with the official folders of IMDB, or train.jsonl(.xz) and test.jsonl(.xz)."""
    max_length: Annotated[int, Ge(1), Le(2**20)] = 4096
    """Bytes of the longest review; longer ones are cut."""


@register_task
class TextTask(LRATask):
    """Decide from its bytes whether a film review is positive."""

    name = "lra-text"
    Options: ClassVar[Any] = TextOptions

    @classmethod
    def read(cls, options: Any, split: str) -> LabelledSequences:
        """Read the reviews of a split."""
        return read_reviews(Path(options.data), split, options.max_length)


@dataclass(frozen=True)
class RetrievalOptions(LRAOptions):
    """Options of retrieval."""

    what = "task 'lra-retrieval'"
    paths = ("data",)

    data: str = "data/aan"
    """Folder with the official new_aan_pairs.train.tsv and new_aan_pairs.test.tsv; the corpus cannot be generated."""
    max_length: Annotated[int, Ge(1), Le(2**20)] = 4000
    """Bytes of the longest text; longer ones are cut."""


@register_task
class RetrievalTask(LRATask):
    """Decide from their bytes whether one of two papers cites the other; both are encoded with the same weights."""

    name = "lra-retrieval"
    Options: ClassVar[Any] = RetrievalOptions
    num_sequences = 2

    @classmethod
    def read(cls, options: Any, split: str) -> LabelledSequences:
        """Read the pairs of a split."""
        folder = Path(options.data)
        names = [f"new_aan_pairs.{split}.tsv", f"new_aan_pairs.{split}.tsv.xz"]
        for name in names:
            if (folder / name).is_file():
                return read_pairs(folder / name, options.max_length)
        raise UserError(f"{folder}: has neither {' nor '.join(names)}; name the folder with data", "not-found")
