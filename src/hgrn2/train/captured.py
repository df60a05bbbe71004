"""Training steps captured in CUDA graphs: the host starts a step with one call instead of thousands of launches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.train.device_adamw import DeviceAdamW
from hgrn2.train.exclusive import exclusive, is_side_by_side

# steps of a shape before it is captured, which compile kernels and allocate permanent memory
_WARMUP_STEPS = 3
# largest number of captured shapes, each with its own memory; steps of further shapes run uncaptured
_MAX_SHAPES = 4


@dataclass(frozen=True)
class _Captured:
    """A captured step, with the memory it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    results: dict[str, Tensor]


class CapturedSteps:
    """Runs training steps, as a CUDA graph once a shape has occurred often enough.

    Args:
        step: runs a step (forward, backward, update) for a batch on the device and its number of targets; must not
            synchronise, and returns scalars by name.
        optimizer: optimizer that `step` uses.
        forget: drops the gradients.
        device: a GPU.
    """

    def __init__(
        self,
        step: Callable[[Any, Tensor], dict[str, Tensor]],
        optimizer: DeviceAdamW,
        forget: Callable[[], None],
        device: torch.device,
    ) -> None:
        self._step, self._optimizer, self._forget, self._device = step, optimizer, forget, device
        self._counts: dict[Any, int] = {}
        self._graphs: dict[Any, _Captured] = {}
        self._pool: Any = None
        self._num_targets, self._last_num_targets = torch.ones((), device=device), 1
        # torch has 32 streams, so a new one may be that of another run of the process
        self._stream = torch.cuda.current_stream(device) if is_side_by_side() else torch.cuda.Stream(device)

    def __call__(self, batch: Any, num_targets: int) -> dict[str, Tensor]:
        """Run a step.

        Args:
            batch: a dataclass with tensors among its fields. If it has a method `pad_sequences`, this is called, so
                that few shapes occur.
            num_targets: number of targets of the batch.

        Returns:
            The results of `step`, which the next call may overwrite.

        Raises:
            UserError: the step synchronises, or does something else that cannot be captured.
        """
        if not is_dataclass(batch):
            raise UserError(
                f"cuda_graph: the task's batches are {type(batch).__name__}; wanted a dataclass with tensors",
                "unsupported",
            )
        if num_targets != self._last_num_targets:
            self._num_targets.fill_(num_targets)
            self._last_num_targets = num_targets
        if (pad_sequences := getattr(batch, "pad_sequences", None)) is not None:
            batch = pad_sequences()
        tensors = {name: x for name, x in vars(batch).items() if isinstance(x, Tensor)}
        key = tuple((name, x.shape, x.dtype) for name, x in tensors.items())
        captured = self._graphs.get(key)
        if captured is None:
            self._counts[key] = self._counts.get(key, 0) + 1
            # the first steps compile kernels
            if self._counts[key] <= _WARMUP_STEPS:
                with exclusive():
                    return self._run(batch)
            if len(self._graphs) >= _MAX_SHAPES:
                return self._run(batch)
            with exclusive():
                captured = self._graphs[key] = self._capture(batch, tensors)
        for name, x in captured.inputs.items():
            x.copy_(tensors[name], non_blocking=True)
        captured.graph.replay()
        return captured.results

    def _run(self, batch: Any) -> dict[str, Tensor]:
        """Run a step on the stream of the capture, which is not the default one."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            results = self._step(batch, self._num_targets)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        return results

    def _capture(self, batch: Any, tensors: dict[str, Tensor]) -> _Captured:
        inputs = {name: x.to(self._device) for name, x in tensors.items()}
        self._forget()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream(self._device).synchronize()
        if not is_side_by_side():
            # free the activations of earlier steps, which the graph cannot use
            gc.collect()
            torch.cuda.empty_cache()
        try:
            with self._optimizer.capture(), self._capturing(graph):
                results = self._step(replace(batch, **inputs), self._num_targets)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"cuda_graph: the step cannot be captured ({reason}); train without it", "unsupported"
            ) from error
        self._pool = graph.pool()
        # the graph owns the memory of the gradients
        self._forget()
        return _Captured(graph, inputs, results)

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Capture what the thread launches; other threads of the process may use the device meanwhile."""
        with torch.cuda.stream(self._stream):
            pool = () if self._pool is None else (self._pool,)
            graph.capture_begin(*pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                # ends a failed capture as well
                graph.capture_end()
