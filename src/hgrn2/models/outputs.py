"""Results of a model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hgrn2.models.state import ModelState
from hgrn2.ops.transforms import is_batched


class LossOutput(NamedTuple):
    """Loss of a batch; unpacks as `total, num_targets, state = model.loss(...)`.

    Attributes:
        sum: cross entropy summed over the targets, in nats; a float32 scalar (float64 for float64 models).
        num_targets: number of targets that were not ignored, an int64 scalar.
        state: the state after the last tokens.
    """

    sum: Tensor
    num_targets: Tensor
    state: ModelState

    @property
    def mean(self) -> Tensor:
        """Cross entropy per target, in nats: the loss to call `backward()` on. 0 if all targets are ignored."""
        return self.sum / self.num_targets.clamp_min(1)

    def __repr__(self) -> str:
        """Return the loss, the number of targets and a summary of the state."""
        if self.sum.is_meta:
            return f"LossOutput(on the meta device, state={self.state!r})"
        if is_batched(self.sum):
            return f"LossOutput(under vmap, state={self.state!r})"
        return f"LossOutput(mean={self.mean.item():.4g}, num_targets={int(self.num_targets)}, state={self.state!r})"
