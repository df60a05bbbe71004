"""Sum gradients over ranks while the backward pass runs.

Hooks of parameters are used instead of a wrapper of the model, so that a task may call any method of the model, and
names of parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# large enough to use the links well, small enough to begin early
_BUCKET_BYTES = 25 * 2**20


class GradientSums:
    """Sums of gradients over ranks, in buckets that are sent as soon as the gradients in them are complete.

    Args:
        parameters: parameters of the model, in its order.
        group: the ranks; None for all.
        bucket_bytes: bytes of gradients sent together.
    """

    def __init__(
        self, parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None, bucket_bytes: int = _BUCKET_BYTES
    ) -> None:
        self._parameters = list(parameters)
        self._group = group
        self._bucket_bytes = bucket_bytes
        self._buckets: list[list[Tensor]] = []
        self._bucket_of: dict[int, int] = {}
        self._signature: list[Any] = []
        self._is_summing = False
        self._is_ready: set[int] = set()
        self._num_missing: list[int] = []
        self._sent: list[tuple[Tensor, Any]] = []
        self._hooked: set[int] = set()

    def begin(self) -> None:
        """Prepare a backward pass after which gradients are complete."""
        signature = [(p.requires_grad, p.dtype, p.device) for p in self._parameters]
        if signature != self._signature:
            # frozen parameters may be unfrozen, and dtypes change, after the model is made
            self._signature = signature
            self._fill_buckets()
        self._num_missing = [len(bucket) for bucket in self._buckets]
        self._is_ready.clear()
        self._sent = []
        self._is_summing = True

    def finish(self) -> None:
        """Send what is left, wait for the sums, and put them in place of the gradients."""
        self._is_summing = False
        while len(self._sent) < len(self._buckets):
            self._send_next()
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            *sums, counts = flat.split([*(p.numel() for p in bucket), len(bucket)])
            # a gradient that no rank has stays None, as in one process
            unknown = [i for i, p in enumerate(bucket) if p.grad is None]
            if unknown:
                is_used = (counts[unknown] > 0).tolist()
                for i, used in zip(unknown, is_used, strict=True):
                    if used:
                        bucket[i].grad = torch.empty_like(bucket[i])
            pairs = [(p.grad, x.view_as(p)) for p, x in zip(bucket, sums, strict=True) if p.grad is not None]
            if pairs:
                grads, found = zip(*pairs, strict=True)
                torch._foreach_copy_(grads, found)  # pyright: ignore[reportPrivateImportUsage]
        self._sent = []

    def _fill_buckets(self) -> None:
        self._buckets, self._bucket_of = [], {}
        num_bytes, kind = 0, None
        # the last layers have their gradients first
        for p in reversed(self._parameters):
            if not p.requires_grad:
                continue
            if id(p) not in self._hooked:
                self._hooked.add(id(p))
                p.register_post_accumulate_grad_hook(self._count)
            if kind != (p.dtype, p.device) or num_bytes > self._bucket_bytes:
                self._buckets.append([])
                num_bytes, kind = 0, (p.dtype, p.device)
            self._buckets[-1].append(p)
            self._bucket_of[id(p)] = len(self._buckets) - 1
            num_bytes += p.numel() * p.element_size()

    def _count(self, p: Tensor) -> None:
        if not self._is_summing or id(p) in self._is_ready:
            return
        self._is_ready.add(id(p))
        self._num_missing[self._bucket_of[id(p)]] -= 1
        # all ranks send in the same order
        while len(self._sent) < len(self._buckets) and not self._num_missing[len(self._sent)]:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[len(self._sent)]
        # how many ranks have each gradient follows the gradients
        has_grad = torch.tensor([float(p.grad is not None) for p in bucket], dtype=bucket[0].dtype)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([*(x.reshape(-1) for x in parts), has_grad.to(bucket[0].device, non_blocking=True)])
        self._sent.append((flat, dist.all_reduce(flat, group=self._group, async_op=True)))
