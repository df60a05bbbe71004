"""AdamW that the device updates alone, with float32 weights of which the model may use bfloat16 copies."""

# a kernel's call takes a grid and compile-time options that its signature does not show
# pyright: reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# elements that a program of the kernels updates
BLOCK = 1024
SUM_BLOCK = 4096


@dataclass(frozen=True)
class Group:
    """Parameters whose gradients have one dtype, and their blocks.

    Attributes:
        params: the model's parameters, in bfloat16 if is_low.
        weights: the float32 weights; the parameters themselves unless is_low.
        tables: [4, N] int64, addresses of weights, first and second moments and bfloat16 copies.
        decays: [N] float32, weight decay of each parameter.
        sizes: [N] int64, elements of each parameter.
        blocks: for BLOCK and for SUM_BLOCK, the parameter of each block and its position in it, int32 each.
        is_low: whether the gradients are in bfloat16.
    """

    params: list[Tensor]
    weights: list[Tensor]
    tables: Tensor
    decays: Tensor
    sizes: Tensor
    blocks: dict[int, tuple[Tensor, Tensor]]
    is_low: bool


class DeviceAdamW:
    """Updates all weights, and bfloat16 copies of some, without waiting for the device.

    The update is that of torch.optim.AdamW, whose moments it takes over and keeps up to date. Autocast also computes
    with weights rounded to bfloat16, and their gradients are bfloat16 in both cases, so a step has the same result up
    to the order of sums, without the conversions.

    Args:
        optimizer: optimizer on one GPU; all parameters are float32 and share one step count and one learning rate.
        low: parameters that the model uses only in bfloat16 products; empty without autocast.
    """

    def __init__(self, optimizer: torch.optim.AdamW, low: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        self._low = {id(p) for p in low}
        self._groups: list[Group] = []
        self._weights: dict[int, Tensor] = {}
        # addresses of the gradients of each group, on the host and on the device
        self._addresses: dict[bool, tuple[list[int], Tensor]] = {}
        # the same for the step being captured, and the tables of captured steps, which still read them
        self._capturing: dict[bool, tuple[list[int], Tensor]] = {}
        self._captured: list[Tensor] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Return a context in which the parameters `low` are bfloat16; at its end they are float32 again."""
        self._begin()
        try:
            yield
        finally:
            self._end()

    def weight(self, param: Tensor) -> Tensor:
        """Return the float32 weight of a parameter."""
        return self._weights.get(id(param), param)

    def prepare(self) -> None:
        """Copy the learning rate to the device; call it before `step`, and before replaying a captured one."""
        self._scalars[4:].fill_(self._optimizer.param_groups[0]["lr"])

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Return a context for capturing a call of `step`, whose gradient addresses are filled in at its end."""
        # allocate before the capture: a replay overwrites memory that was allocated during it
        self._capturing = {group.is_low: ([], torch.empty_like(group.sizes)) for group in self._groups}
        try:
            yield
            for addresses, table in self._capturing.values():
                table.copy_(torch.tensor(addresses, dtype=torch.int64))
                self._captured.append(table)
        finally:
            self._capturing = {}

    def step(self, loss: Tensor, clip_norm: float) -> Tensor:
        """Clip the gradient and update, unless the loss or the gradient is not finite.

        Args:
            loss: a float32 scalar.
            clip_norm: largest norm of the gradient; 0 for no clipping.

        Returns:
            The norm of the gradient before it was clipped, a float32 scalar on the device.
        """
        from hgrn2.train import adamw_kernels as kernels

        addresses = [self._gradients(group) for group in self._groups]
        offset = 0
        for group, grads in zip(self._groups, addresses, strict=True):
            tensors, orders = group.blocks[SUM_BLOCK]
            kernels.squares_kernel[(len(tensors),)](
                grads, tensors, orders, group.sizes, self._sums[offset:], IS_LOW=group.is_low, BLOCK=SUM_BLOCK,
                num_warps=8,
            )  # fmt: skip
            offset += len(tensors)
        settings = self._optimizer.param_groups[0]
        beta1, beta2 = settings["betas"]
        norm = torch.empty((), dtype=torch.float32, device=loss.device)
        kernels.prepare_kernel[(1,)](
            self._sums, loss, self._step, norm, self._scalars, offset, clip_norm, math.log2(beta1), math.log2(beta2),
            BLOCK=1024, num_warps=8,
        )  # fmt: skip
        for group, grads in zip(self._groups, addresses, strict=True):
            tensors, orders = group.blocks[BLOCK]
            kernels.update_kernel[(len(tensors),)](
                group.tables, grads, tensors, orders, group.sizes, group.decays, self._scalars, beta1, beta2,
                settings["eps"], len(group.params), IS_LOW=group.is_low, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
        return norm

    def _begin(self) -> None:
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        decays = {id(p): group["weight_decay"] for group in self._optimizer.param_groups for p in group["params"]}
        device = params[0].device
        state = self._optimizer.state
        steps = {float(state[p]["step"]) for p in params if p in state}
        assert len(steps) <= 1, f"parameters of several ages: {steps}"
        self._step = torch.tensor(steps.pop() if steps else 0.0, device=device)
        for p in params:
            state[p].setdefault("exp_avg", torch.zeros_like(p))
            state[p].setdefault("exp_avg_sq", torch.zeros_like(p))
            # one count for all, which the kernel increments
            state[p]["step"] = self._step
        self._scalars = torch.zeros(5, device=device)
        low, full = [p for p in params if id(p) in self._low], [p for p in params if id(p) not in self._low]
        for p in low:
            self._weights[id(p)] = p.data
            p.data = p.data.to(torch.bfloat16)
        self._groups = [self._group(some, decays, is_low) for some, is_low in ((low, True), (full, False)) if some]
        self._sums = torch.empty(sum(len(group.blocks[SUM_BLOCK][0]) for group in self._groups), device=device)

    def _group(self, params: list[Tensor], decays: Mapping[int, float], is_low: bool) -> Group:
        device, state = params[0].device, self._optimizer.state
        weights = [self.weight(p) for p in params]
        rows = [weights, [state[p]["exp_avg"] for p in params], [state[p]["exp_avg_sq"] for p in params], params]
        assert all(x.is_contiguous() and x.data_ptr() % 16 == 0 for row in rows for x in row)
        sizes = torch.tensor([p.numel() for p in params])
        blocks = {}
        for block in (BLOCK, SUM_BLOCK):
            counts = -(-sizes // block)
            tensors = torch.arange(len(params)).repeat_interleave(counts)
            orders = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
            blocks[block] = tensors.int().to(device), orders.int().to(device)
        return Group(
            params=params,
            weights=weights,
            tables=torch.tensor([[x.data_ptr() for x in row] for row in rows], dtype=torch.int64).to(device),
            decays=torch.tensor([decays[id(p)] for p in params], dtype=torch.float32).to(device),
            sizes=sizes.to(device),
            blocks=blocks,
            is_low=is_low,
        )

    def _gradients(self, group: Group) -> Tensor:
        """Return the addresses of the gradients, 0 for none, on the device."""
        dtype = torch.bfloat16 if group.is_low else torch.float32
        for p in group.params:
            if p.grad is not None and (p.grad.dtype != dtype or not _can_be_read(p.grad)):
                p.grad = p.grad.to(dtype).clone(memory_format=torch.contiguous_format)
        found = [0 if p.grad is None else p.grad.data_ptr() for p in group.params]
        if group.is_low in self._capturing:
            addresses, table = self._capturing[group.is_low]
            addresses[:] = found
            return table
        # torch allocates in the same order every step, so the addresses rarely change
        known, table = self._addresses.get(group.is_low, ([], None))
        if table is None or found != known:
            table = torch.tensor(found, dtype=torch.int64)
            if group.sizes.is_cuda:
                # pinned memory is copied without waiting, and is not used again before it has been
                table = table.pin_memory().to(group.sizes.device, non_blocking=True)
            self._addresses[group.is_low] = found, table
        return table

    def _end(self) -> None:
        for group in self._groups:
            for p, weight in zip(group.params, group.weights, strict=True):
                p.data = weight
        for state in self._optimizer.state.values():
            state["step"] = self._step.clone()
        self._groups, self._weights, self._addresses, self._captured = [], {}, {}, []


def _can_be_read(grad: Tensor) -> bool:
    """Return whether a gradient can be read in order, 16 bytes at a time."""
    return grad.is_contiguous() and grad.data_ptr() % 16 == 0
