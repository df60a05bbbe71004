"""Training in several processes with torch.distributed: NCCL between GPUs, gloo between CPUs."""

from hgrn2.train.distributed.join import joined
from hgrn2.train.distributed.launch import launch
from hgrn2.train.distributed.ranks import Ranks

__all__ = ["Ranks", "joined", "launch"]
