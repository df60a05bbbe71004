"""Split weights, gradients and optimizer states over ranks with FSDP2 (torch's fully_shard)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hgrn2.errors import UserError
from hgrn2.nn.norm import Norm
from hgrn2.nn.short_conv import ShortConv
from hgrn2.tasks.base import Task
from hgrn2.train.config import TrainConfig

# layers whose parameters may be gathered in bfloat16: one-process training rounds the same ones when it uses them
_LOW = (nn.Linear, Norm, ShortConv)


def check_sharding(model: Any, task: Task, config: TrainConfig) -> None:
    """Refuse what cannot be trained with split weights.

    Raises:
        UserError: the task calls the model in a way that gathers no weights, or a setting does not fit.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not task.calls_forward or not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"shard: task {task.name!r} does not call its model as a whole, which gathers the weights; leave shard out",
            "unsupported",
        )
    if config.freeze:
        raise UserError("shard cannot be used with freeze; leave one out", "contradiction")


def shard(model: Any, config: TrainConfig, mesh: Any) -> None:
    """Compile block by block, then split the weights; activations are recomputed around the blocks.

    Args:
        model: a model with `model.layers`; every rank has the same weights.
        config: training settings, of which compile, precision and reshard are used.
        mesh: the ranks, a one-dimensional DeviceMesh.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if config.compile:
        # hooks of the sharding run between blocks, outside what is compiled
        model.model.stop_compiling_blocks()
        for layer in model.model.layers:
            _compile_forward(layer)
    is_low = config.precision == "bfloat16"
    for layer in model.model.layers:
        low = torch.bfloat16 if is_low and _can_be_low(layer) else None
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard)
    # embeddings, head and lower bounds: needed at both ends of the forward pass
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _can_be_low(layer: nn.Module) -> bool:
    owners = [module for module in layer.modules() if next(module.parameters(recurse=False), None) is not None]
    return all(isinstance(module, _LOW) for module in owners)


def _compile_forward(layer: Any) -> None:
    plain = layer.forward
    compiled = torch.compile(plain)

    def forward(*arguments: Any) -> Any:
        # evaluation has too many shapes to be worth compiling
        return (compiled if layer.training else plain)(*arguments)

    layer.forward = forward
