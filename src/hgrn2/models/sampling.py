"""Sample the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from hgrn2.constraints import Ge, Gt, Le, Lt, check_fields

# tokens of a prompt read in one pass, to limit memory
PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling. The filters apply in the order of the fields.

    Attributes:
        repetition_penalty: above 1, makes tokens that already occurred less likely (arXiv 1909.05858).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep this many of the likeliest; 0 keeps all.
        top_p: keep the fewest tokens that together reach this probability (arXiv 1904.09751); 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest (arXiv 2407.01082); 0 keeps all.
        seed: seed of the random numbers; None for a random one.
    """

    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] = 1.0
    temperature: Annotated[float, Ge(0)] = 0.8
    top_k: Annotated[int, Ge(0)] = 0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    seed: Annotated[int | None, Ge(-(2**63)), Lt(2**64)] = None

    def __post_init__(self) -> None:
        check_fields(self, "sampling")


def sample(logits: Tensor, sampling: Sampling, seen: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Sample one token per row.

    Args:
        logits: [B, vocab].
        sampling: settings.
        seen: [B, vocab] bool, tokens to which the repetition penalty applies, or None.
        generator: source of the random numbers; None for torch's global one.

    Returns:
        [B] int64.
    """
    logits = logits.float()
    if seen is not None and sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # subtract the largest logit, and limit the temperature, to avoid inf - inf
    logits = (logits - logits.amax(-1, keepdim=True)) / max(sampling.temperature, 1e-6)
    if 0 < sampling.top_k < logits.shape[-1]:
        # by index, because more than top_k logits may be equal
        kept = logits.topk(sampling.top_k, -1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        # drop tokens after those that reach top_p; always keep the likeliest
        gone = p.cumsum(-1) - p >= sampling.top_p
        gone[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(gone).scatter(-1, order, gone), -torch.inf)
    if sampling.min_p > 0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
