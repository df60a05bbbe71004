"""Memory of training on one or several GPUs, counted before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

from hgrn2.models.config import HGRN2Config
from hgrn2.models.cost import activation_bytes, shapes_of

_FLOAT32, _BFLOAT16 = 4, 2
# AdamW keeps two float32 numbers per parameter
_OPTIMIZER = 8
# layers that are gathered at the same time: one at work, one on its way
_GATHERED_LAYERS = 2


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU for one way to train under bfloat16.

    Attributes:
        settings: settings of training that choose it, as flags; empty for the defaults.
        weights: float32 weights, or this GPU's part of them, and what is gathered or copied in bfloat16.
        gradients: gradients in float32, or this GPU's part.
        optimizer: AdamW's state, or this GPU's part.
        activations: saved for the backward pass.
    """

    settings: str
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts, without the workspace of kernels and the loss."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_plans(config: HGRN2Config, num_gpus: int, tokens: int, seq_len: int) -> list[MemoryPlan]:
    """Return the memory of each way to train under bfloat16 with AdamW, from the fastest to the smallest.

    Args:
        config: the model.
        num_gpus: number of GPUs that train together.
        tokens: tokens of one forward pass on all GPUs together.
        seq_len: tokens of a sequence.
    """
    model = shapes_of(config)
    parameters = model.num_parameters()
    in_layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    outside = parameters - sum(in_layers)
    own_tokens = -(-tokens // num_gpus)
    whole = own_tokens * activation_bytes(model, seq_len, _BFLOAT16)
    recomputed = own_tokens * activation_bytes(model, seq_len, _BFLOAT16, checkpointed=True)

    def part(num_bytes: int) -> int:
        return -(-num_bytes // num_gpus)

    # a copy of the matrices that the model computes with
    copied = _FLOAT32 * parameters + _BFLOAT16 * sum(in_layers)
    state = _FLOAT32 * parameters, _OPTIMIZER * parameters
    plans = [
        MemoryPlan("", copied, *state, whole),
        MemoryPlan("--activation-checkpointing", copied, *state, recomputed),
    ]
    if num_gpus == 1:
        return plans
    # embeddings and head stay gathered in float32
    ends = _FLOAT32 * outside
    kept = part(_FLOAT32 * parameters) + ends + _BFLOAT16 * sum(in_layers)
    freed = part(_FLOAT32 * parameters) + ends + _BFLOAT16 * _GATHERED_LAYERS * max(in_layers, default=0)
    # whole gradients of the layers at work, before they are summed
    at_work = ends + _FLOAT32 * _GATHERED_LAYERS * max(in_layers, default=0)
    parts = part(_FLOAT32 * parameters) + at_work, part(_OPTIMIZER * parameters)
    return [
        *plans,
        MemoryPlan("--shard --no-reshard", kept, *parts, whole),
        MemoryPlan("--shard", freed, *parts, whole),
        MemoryPlan("--shard --activation-checkpointing", freed, *parts, recomputed),
    ]
