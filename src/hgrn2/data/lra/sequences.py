"""Labelled sequences in one array, padded, with their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hgrn2.errors import UserError


@dataclass(frozen=True)
class LabelledSequences:
    """Examples of a classification task.

    Attributes:
        inputs: [N, T] uint8 token ids or grey values, [N, 2, T] for pairs, [N, T, C] for colours; 0 after the end.
        lengths: [N] or [N, 2] int32, or None where every sequence has T tokens.
        labels: [N] int64.
        class_names: name of each label.
        notes: number of examples that were cut or skipped, by reason.
    """

    inputs: NDArray[Any]
    lengths: NDArray[np.int32] | None
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    notes: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def checked(self, what: str) -> LabelledSequences:
        """Return the examples if they are valid.

        Args:
            what: where they come from, for messages.

        Raises:
            UserError: there are none, a label is out of range, or a class has no example.
        """
        if not len(self):
            raise UserError(f"{what}: holds no examples", "not-found")
        num, low, high = len(self.class_names), int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= num:
            raise UserError(f"{what}: has labels from {low} to {high}; wanted 0 to {num - 1}", "mismatch")
        counts = np.bincount(self.labels, minlength=num)
        if empty := [name for name, count in zip(self.class_names, counts, strict=True) if not count]:
            raise UserError(f"{what}: no example of class {', '.join(empty)}; wanted some of every class", "not-found")
        return self

    def rows(self, rows: Any) -> LabelledSequences:
        """Return some of the examples."""
        lengths = None if self.lengths is None else self.lengths[rows]
        return LabelledSequences(self.inputs[rows], lengths, self.labels[rows], self.class_names, self.notes)


def pack_bytes(texts: Sequence[bytes], max_length: int, notes: dict[str, int]) -> tuple[Any, NDArray[np.int32]]:
    """Return texts as padded bytes [N, max_length] and their lengths [N]; longer texts are cut and counted.

    Args:
        texts: the texts.
        max_length: longest sequence.
        notes: receives the number of "cut" texts.
    """
    inputs, lengths = np.zeros((len(texts), max_length), np.uint8), np.zeros(len(texts), np.int32)
    for row, text in enumerate(texts):
        if len(text) > max_length:
            notes["cut"] = notes.get("cut", 0) + 1
        kept = text[:max_length]
        inputs[row, : len(kept)] = np.frombuffer(kept, np.uint8)
        lengths[row] = len(kept)
    return inputs, lengths
