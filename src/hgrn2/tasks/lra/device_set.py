"""Sequences that stay on the device, and batches of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from hgrn2.data.lra.sequences import LabelledSequences

# number of widths that padded batches are cut to, equal fractions of the longest; CUDA graphs keep at most four shapes
NUM_WIDTHS = 4


@dataclass(frozen=True)
class SequenceBatch:
    """A batch on the device.

    Attributes:
        inputs: [B, T], [B, 2, T] or [B, T, C] uint8.
        lengths: [B] or [B, 2] int32, or None without padding.
        labels: [B] int64.
        is_masked: [B, T] bool, True for masked tokens; None when training on classes.
    """

    inputs: Tensor
    lengths: Tensor | None
    labels: Tensor
    is_masked: Tensor | None = None


@dataclass(frozen=True)
class DeviceSet:
    """Examples on the device, with their lengths on the CPU as well."""

    inputs: Tensor
    lengths: Tensor | None
    labels: Tensor
    longest: Tensor | None = field(default=None)

    @classmethod
    def of(cls, found: LabelledSequences, device: torch.device) -> Self:
        """Copy examples to a device."""
        inputs = torch.from_numpy(np.ascontiguousarray(found.inputs)).to(device)
        labels = torch.from_numpy(found.labels).to(device)
        if found.lengths is None:
            return cls(inputs, None, labels)
        lengths = torch.from_numpy(found.lengths)
        # the longer sequence of a pair decides
        return cls(inputs, lengths.to(device), labels, lengths.reshape(len(lengths), -1).amax(1))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> SequenceBatch:
        """Return rows [B] (on the CPU) as a batch, cut to one of a few widths."""
        there = rows.to(self.labels.device, non_blocking=True)
        inputs, lengths = self.inputs.index_select(0, there), None
        if self.lengths is not None and self.longest is not None:
            lengths = self.lengths.index_select(0, there)
            full = self.inputs.shape[-1]
            part = -(-full // NUM_WIDTHS)
            width = min(full, part * max(1, -(-int(self.longest[rows].max()) // part)))
            inputs = inputs[..., :width].contiguous()
        return SequenceBatch(inputs, lengths, self.labels.index_select(0, there))
