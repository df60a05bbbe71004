"""Choose the number of processes of a command, and run work on the main one first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from hgrn2.cli.config_file import read_toml
from hgrn2.devices import choose_device
from hgrn2.errors import UserError
from hgrn2.formats.run_folder import read_config, resume_point
from hgrn2.train.config import TrainConfig
from hgrn2.train.distributed.environment import rank_environment
from hgrn2.train.parallel import Parallel
from hgrn2.train.specs import check_batch

T = TypeVar("T")


def choose_processes(processes: int | None, given: Mapping[str, Any], config: Path | None, resume: Path | None) -> int:
    """Return the number of processes to start; 1 to train in this one."""
    if processes is not None and processes < 1:
        raise UserError(f"--processes is {processes}; wanted at least 1")
    if rank_environment() is not None:
        # the launcher's flag is passed on
        return 1
    if processes is None and torch.cuda.device_count() < 2:
        return 1
    settings = _named_settings(given, config, resume)
    device, pieces = choose_device(settings["device"]), settings["context_parallel"]
    num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if processes is None:
        # a named GPU is the only one that is used
        if device.index is not None or settings["cuda_graph"]:
            return 1
        numbers = range(pieces, num_gpus + 1, pieces)
        return max((n for n in numbers if settings["batch_size"] % (n // pieces) == 0), default=1)
    if processes > 1:
        # another number is refused by all ranks together
        check_batch(settings["batch_size"], max(1, processes // pieces))
        if num_gpus and processes > num_gpus:
            raise UserError(
                f"--processes is {processes}, and this machine has {num_gpus} GPUs; lower it, or use --device cpu",
                "unavailable",
            )
    return processes


def _named_settings(given: Mapping[str, Any], config: Path | None, resume: Path | None) -> dict[str, Any]:
    """Return the settings that the number of processes depends on."""
    found: Any = {}
    if resume is not None:
        found = read_config(resume_point(resume)[0]).get("train")
    elif config is not None:
        found = read_toml(config)["train"]
    named = (found if isinstance(found, dict) else {}) | dict(given)
    # reports wrong values before anything starts
    names = ("device", "cuda_graph", "batch_size", "context_parallel")
    settings = TrainConfig.from_dict({"max_steps": 1} | {name: named[name] for name in names if name in named})
    return {name: getattr(settings, name) for name in names}


def main_first(parallel: Parallel, work: Callable[[], T]) -> T:
    """Call a function on the main rank, then on the others, which find the files that it has written."""
    found = parallel.on_main(work)
    return found if found is not None else work()
