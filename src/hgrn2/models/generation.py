"""Generate token ids: read prompts, then sample token by token."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.models.inputs import checked_ids, checked_mask
from hgrn2.models.sampling import PREFILL_TOKENS, Sampling, sample
from hgrn2.ops.transforms import is_batched


@torch.no_grad()
def generate(
    model: Any, input_ids: Tensor, max_tokens: int, sampling: Sampling | None, attention_mask: Tensor | None,
    stop_ids: Collection[int],
) -> Tensor:  # fmt: skip
    """Continue prompts; arguments and result of `HGRN2LM.generate`."""
    input_ids = checked_ids("input_ids", input_ids, "[B, T]", model.model.embeddings)
    if is_batched(input_ids):
        raise UserError(
            "generate reads values, which vmap hides; give all prompts as one batch, or use a loop", "unsupported"
        )
    if not input_ids.shape[1]:
        raise UserError("input_ids has no tokens; give at least one, such as the token that ends a text")
    if not isinstance(max_tokens, int) or max_tokens < 0:
        raise UserError(f"max_tokens is {max_tokens!r}; wanted a number of tokens")
    sampling = Sampling() if sampling is None else sampling
    mask = None if attention_mask is None else checked_mask(attention_mask, input_ids)
    if mask is not None and not bool(mask[:, -1].all()):
        raise UserError("attention_mask ends in padding; pad on the left, so that the last place is a token")
    device = input_ids.device
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    seen = torch.zeros((input_ids.shape[0], model.config.vocab_size), dtype=torch.bool, device=device)
    # replace padding by the last place, which is a token
    seen.scatter_(1, input_ids if mask is None else torch.where(mask, input_ids, input_ids[:, -1:]), True)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
    ended = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=device)
    was_training = model.training
    model.eval()
    try:
        state, written = None, [input_ids]
        for start in range(0, input_ids.shape[1], PREFILL_TOKENS):
            part = slice(start, start + PREFILL_TOKENS)
            padding = None if mask is None else mask[:, part]
            x, state = model.hidden_states(input_ids[:, part], state, attention_mask=padding)
        for i in range(max_tokens):
            logits = model.lm_head(x[:, -1])
            if not bool(logits.isfinite().all()):
                raise UserError("generate: the model's outputs are not finite; use another checkpoint", "not-finite")
            drawn = sample(logits, sampling, seen, generator)
            # a finished text repeats its last token
            drawn = torch.where(ended, written[-1][:, -1], drawn).unsqueeze(1)
            written.append(drawn)
            ended = ended | torch.isin(drawn[:, 0], stops)
            if bool(ended.all()) or i + 1 == max_tokens:
                break
            seen.scatter_(1, drawn, True)
            x, state = model.hidden_states(drawn, state)
    finally:
        model.train(was_training)
    return torch.cat(written, 1)
