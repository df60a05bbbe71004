"""Read which rank this process is, from the variables that torchrun and Slurm recipes set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hgrn2.errors import UserError

# begins the name of a job that `hgrn2 train` has started; its process id follows
RUN_ID = "hgrn2-"
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class RankEnvironment:
    """Place of this process among the ranks of a job.

    Attributes:
        rank: number of the process, 0 <= rank < num_ranks.
        num_ranks: number of processes.
        local_rank: number of the process on its machine; its GPU.
        address: host name of the machine that serves the store, usually that of rank 0.
        port: TCP port of the store.
        has_store: whether a launcher serves the store; otherwise rank 0 does.
        attempt: how often the launcher has restarted the ranks.
        launcher: process id of `hgrn2 train`, if it has started the ranks itself.
    """

    rank: int
    num_ranks: int
    local_rank: int
    address: str
    port: int
    has_store: bool = False
    attempt: int = 0
    launcher: int | None = None


def rank_environment(variables: Mapping[str, str] | None = None) -> RankEnvironment | None:
    """Return the place of this process; None outside a job, and in a job of one process.

    Args:
        variables: environment variables; None for those of the process.

    Raises:
        UserError: some of the variables are missing or are not numbers.
    """
    variables = os.environ if variables is None else variables
    # schedulers set WORLD_SIZE in plain commands too
    if "RANK" not in variables:
        return None
    if missing := [name for name in _NAMES if name not in variables]:
        raise UserError(
            f"environment: RANK is set, but {' and '.join(missing)} are not; start with torchrun, or unset RANK",
            "incomplete",
        )
    rank, num_ranks, port = (_number(variables, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= num_ranks:
        raise UserError(f"environment: RANK is {rank}; wanted less than WORLD_SIZE = {num_ranks}", "contradiction")
    if num_ranks == 1:
        return None
    run_id = variables.get("TORCHELASTIC_RUN_ID", "")
    launcher = run_id.removeprefix(RUN_ID) if run_id.startswith(RUN_ID) else ""
    return RankEnvironment(
        rank,
        num_ranks,
        _number(variables, "LOCAL_RANK") if "LOCAL_RANK" in variables else rank,
        variables["MASTER_ADDR"],
        port,
        # as torch reads it
        variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        int(variables.get("TORCHELASTIC_RESTART_COUNT", "0")),
        int(launcher) if launcher.isdecimal() else None,
    )


def _number(variables: Mapping[str, str], name: str) -> int:
    value = variables[name]
    if not value.isdecimal():
        raise UserError(f"environment: {name} is {value!r}; wanted a whole number, 0 or more")
    return int(value)
