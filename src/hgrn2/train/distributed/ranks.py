"""Training on all ranks of a job: each computes its part of every batch."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from hgrn2.errors import CODES, UserError
from hgrn2.ops.pieces import PieceGroup
from hgrn2.tasks.base import Task
from hgrn2.train.checkpoint import Checkpoint, CheckpointStore, load_checkpoint
from hgrn2.train.config import TrainConfig
from hgrn2.train.distributed.environment import RankEnvironment
from hgrn2.train.distributed.gradients import GradientSums
from hgrn2.train.distributed.sharding import check_sharding, shard
from hgrn2.train.distributed.watch import Watch
from hgrn2.train.parallel import Share
from hgrn2.train.rng import rng_state, rng_state_of_seed
from hgrn2.train.sharded_tensors import whole

T = TypeVar("T")

# the main rank may prepare data or write a report meanwhile; the watch notices a rank that is gone
_CONTROL_TIMEOUT = datetime.timedelta(days=2)


class Ranks:
    """The processes of a job that train together; made by `hgrn2.train.distributed.joined`.

    Args:
        place: place of this process among the ranks.
        watch: notices when another rank ends.

    Attributes:
        rank: number of this process.
        num_ranks: number of processes.
        is_main: whether this is rank 0, which writes files and shows progress.
        signal_repeat_s: seconds within which a further signal counts as the same request.
    """

    # a launcher passes on a signal that the terminal or the scheduler has sent to the ranks as well
    signal_repeat_s = 2.0

    def __init__(self, place: RankEnvironment, watch: Watch) -> None:
        self.rank, self.num_ranks, self._local_rank = place.rank, place.num_ranks, place.local_rank
        self.is_main = place.rank == 0
        self._watch = watch
        # numbers and objects of the host, apart from tensors of the device
        self._control: Any = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
        self._gradients: GradientSums | None = None
        self._sharded: Any = None
        self._piece_groups: dict[int, Any] = {}

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this rank: of several GPUs, the one with its local number.

        Raises:
            UserError: the machine has fewer GPUs than ranks, or one GPU is named.
        """
        if device.type != "cuda":
            return device
        num_gpus = torch.cuda.device_count()
        if device.index is not None:
            raise UserError(
                f"device {str(device)!r} is one GPU, and {self.num_ranks} processes train; use cuda", "contradiction"
            )
        if self._local_rank >= num_gpus:
            raise UserError(
                f"rank {self.rank}: no GPU left for process {self._local_rank + 1} of this machine, which has "
                f"{num_gpus}; start fewer processes, or use --device cpu",
                "unavailable",
            )
        torch.cuda.set_device(self._local_rank)
        return torch.device("cuda", self._local_rank)

    def share(self, config: TrainConfig) -> Share:
        """Return the examples of this rank; neighbours share sequences."""
        count = config.context_parallel
        if self.num_ranks % count:
            raise UserError(
                f"context_parallel is {count}, which does not divide the number of processes, {self.num_ranks}",
                "contradiction",
            )
        if count == 1:
            return Share(self.rank, self.num_ranks)
        if count not in self._piece_groups:
            # every rank makes every group
            groups = [dist.new_group(list(range(i, i + count))) for i in range(0, self.num_ranks, count)]
            self._piece_groups[count] = groups[self.rank // count]
        pieces = PieceGroup(self._piece_groups[count], self.rank % count, count)
        return Share(self.rank // count, self.num_ranks // count, pieces)

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Check that facts, JSON values, are the same on all ranks.

        Raises:
            UserError: they are not; the message names those that differ, and is the same on every rank.
        """
        flat = dict(_flatten("", json.loads(json.dumps(facts, default=str))))
        digest = hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()
        found = self._gather(digest)
        if len(set(found)) == 1:
            return
        all_facts = self._gather(flat)
        other = next(rank for rank, one in enumerate(found) if one != found[0])
        first, second = all_facts[0], all_facts[other]
        differing = [key for key in first | second if first.get(key) != second.get(key)]
        shown = ", ".join(f"{key} is {second.get(key)!r}, on rank 0 {first.get(key)!r}" for key in differing[:4])
        raise UserError(f"rank {other}: {shown}; start all ranks with the same settings, data and versions", "mismatch")

    @property
    def is_sharded(self) -> bool:
        """Whether every rank holds only its part of the weights."""
        return self._sharded is not None

    def prepare(self, model: nn.Module, task: Task, config: TrainConfig) -> nn.Module:
        """Give the model the main rank's weights, split them if `config.shard`, and return it."""
        self._gradients = self._sharded = None
        if config.shard:
            check_sharding(model, task, config)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                dist.broadcast(tensor.data, 0)
        if config.shard:
            device = next(model.parameters()).device
            shard(model, config, init_device_mesh(device.type, (self.num_ranks,)))
            self._sharded = model
        else:
            self._gradients = GradientSums(model.parameters())
        return model

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Compute gradients; after the last batch of a step they are summed over the ranks."""
        if self._sharded is not None:
            self._sharded.set_requires_gradient_sync(is_last)
            self._sharded.set_is_last_backward(is_last)
            # the gradient is averaged over the ranks
            (loss * self.num_ranks).backward()
            return
        assert self._gradients is not None, "call prepare first"
        if not is_last:
            loss.backward()
            return
        self._gradients.begin()
        loss.backward()
        self._gradients.finish()

    def sum_counts(self, *counts: int) -> tuple[int, ...]:
        """Return the sums of counts over the ranks."""
        found = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(found, group=self._control)
        return tuple(found.tolist())

    def sum_values(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums of scalars over the ranks, on their device."""
        names = list(values)
        found = torch.stack([values[name].detach().to(torch.float64) for name in names])
        dist.all_reduce(found)
        return {name: x.to(values[name].dtype) for name, x in zip(names, found.unbind(), strict=True)}

    def global_norm(self, norm: Tensor) -> Tensor:
        """Return the norm of the whole gradient, of which a rank may have only its part."""
        return whole(norm)

    def from_main(self, value: T) -> T:
        """Return the main rank's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, 0, group=self._control)
        return box[0]

    def first_of(self, value: T | None) -> T | None:
        """Return the value of the first rank that has one."""
        first = torch.tensor([self.num_ranks if value is None else self.rank])
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self._control)
        if (rank := int(first)) == self.num_ranks:
            return None
        box = [value]
        dist.broadcast_object_list(box, rank, group=self._control)
        return box[0]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Call a function on the main rank; other ranks wait, return None, and raise if it raised there."""
        result: T | None = None
        raised: BaseException | None = None
        if self.is_main:
            try:
                result = work()
            except BaseException as error:
                raised = error
        code = getattr(raised, "code", None)
        if code not in CODES:
            code = "unwritable" if isinstance(raised, OSError) else "invalid-value"
        told = self.from_main(None if raised is None else (str(raised) or type(raised).__name__, code))
        if raised is not None:
            raise raised
        if told is not None:
            raise UserError(*told)
        return result

    def save(self, store: CheckpointStore, **parts: Any) -> None:
        """Write a checkpoint on the main rank, in the format of one process."""
        if self.is_sharded:
            parts |= {name: self._gather_tensors(parts[name]) for name in ("model", "optimizer")}
        state = dict(parts["state"])
        # the main rank's are in "rng"
        state["rng_of_ranks"] = self._gather(rng_state())
        self.on_main(lambda: store.save(**{**parts, "state": state}) and None)

    def load(self, path: Path) -> Checkpoint:
        """Read a checkpoint of any number of ranks; random generators are those of this rank."""
        saved = load_checkpoint(path)
        own = saved.state.get("rng_of_ranks")
        if isinstance(own, list) and len(own) == self.num_ranks:
            rng = own[self.rank]
        elif self.is_main:
            rng = saved.state["rng"]
        else:
            rng = rng_state_of_seed(self.own_seed(saved.state["step"]))
        return replace(saved, state=saved.state | {"rng": rng})

    def own_seed(self, seed: int) -> int:
        """Return the seed of this rank's dropout; the main rank's is the seed itself."""
        if self.is_main:
            return seed
        return int.from_bytes(hashlib.sha256(f"{seed}/{self.rank}".encode()).digest()[:8])

    def join_streams(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the states carried by the streams of all ranks, in the order of one process; {} on other ranks."""
        found = self._gather({name: x.cpu() for name, x in tensors.items()})
        if not self.is_main or not tensors:
            return {}
        return {name: torch.cat([one[name] for one in found]) for name in tensors}

    def own_streams(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's part of the states carried by all streams."""
        return {name: x.chunk(self.num_ranks)[self.rank].clone() for name, x in tensors.items()}

    def _gather_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors on the CPU of the main rank, one after the other; {} on other ranks."""
        found = {}
        for name, tensor in tensors.items():
            one = whole(tensor)
            if self.is_main:
                found[name] = one.cpu()
        return found

    def advise(self, advice: str) -> None:
        """Set what the message about a rank that ended should end with."""
        self._watch.advice = advice

    def wait_for_all(self) -> None:
        """Wait until all ranks have come to this place."""
        dist.barrier(group=self._control)

    def _gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(found, value, group=self._control)
        return found


def _flatten(name: str, value: Any) -> list[tuple[str, Any]]:
    """Return the values of nested tables by their full names."""
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for key, part in value.items() for pair in _flatten(f"{name}.{key}" if name else key, part)]
