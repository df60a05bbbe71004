"""Tokens on their way from the device to the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hgrn2.serve.requests import Running, TokenEvent
from hgrn2.serve.sampling import Drawn


class _Pending(NamedTuple):
    running: list[Running]
    drawn: Drawn
    logits: Tensor | None
    arrived: torch.cuda.Event | None


class Results:
    """Queue of drawn tokens, the oldest first; on a GPU they are copied while the next step runs.

    Args:
        is_async: whether the device is a GPU.
    """

    def __init__(self, is_async: bool):
        self.is_async = is_async
        self._pending: deque[_Pending] = deque()

    @property
    def num_pending(self) -> int:
        """Steps whose tokens were not taken."""
        return len(self._pending)

    def push(self, running: Sequence[Running], drawn: Drawn, logits: Tensor) -> None:
        """Start the copy of the tokens of a step.

        Args:
            running: the continuations, one for each of the first rows of the tensors.
            drawn: the tokens, which the next step may overwrite.
            logits: [B, vocab], which the next step may overwrite.
        """
        count = len(running)
        wanted = any(one.request.return_logits for one in running)
        found = Drawn(*(None if x is None else self._to_host(x[:count]) for x in drawn))  # pyright: ignore
        kept = self._to_host(logits[:count]) if wanted else None
        arrived = None
        if self.is_async:
            arrived = torch.cuda.Event()
            arrived.record()
        self._pending.append(_Pending(list(running), found, kept, arrived))

    def pop(self) -> list[tuple[Running, TokenEvent]]:
        """Wait for the oldest step; return the token of each continuation that has not ended meanwhile."""
        running, drawn, logits, arrived = self._pending.popleft()
        if arrived is not None:
            arrived.synchronize()
        tokens = drawn.tokens.tolist()
        logprob = None if drawn.logprob is None else drawn.logprob.tolist()
        events = []
        for i, one in enumerate(running):
            if one.finish_reason is not None:
                continue
            chosen, top = None, ()
            most = one.request.logprobs
            if most is not None and logprob is not None:
                assert drawn.top_tokens is not None
                assert drawn.top_logprobs is not None
                chosen = logprob[i]
                top = tuple(
                    zip(drawn.top_tokens[i, :most].tolist(), drawn.top_logprobs[i, :most].tolist(), strict=True)
                )
            own = None
            if logits is not None and one.request.return_logits:
                own = logits[i] if logits.dtype == torch.float64 else logits[i].float()
            token = tokens[i] if tokens[i] >= 0 else None
            events.append((one, TokenEvent(*one.key, token, None, chosen, top, own)))
        return events

    def _to_host(self, x: Tensor) -> Tensor:
        if self.is_async:
            return x.to("cpu", non_blocking=True)
        # the next step of a batch of another size has its own tensors, but rows at fixed addresses change
        return x.clone()
