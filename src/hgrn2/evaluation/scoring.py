"""Score continuations of any length after contexts of any length, read in pieces with carried state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from hgrn2.errors import UserError
from hgrn2.hf.cache import StateLayer
from hgrn2.hf.language import HGRN2ForCausalLM
from hgrn2.models.cost import cache_costs, cost

# tokens per forward pass over all rows; bounds the memory, not the length of texts
PIECE_TOKENS = 4096
# logits in memory at a time, 64 MB in float32
PIECE_LOGITS = 2**24
# most rows that "auto" chooses, and the memory for their states where the free memory is unknown
MOST_ROWS = 64
STATE_BYTES = 2**30
# message for scoring and generation
NOT_FINITE = "the model's outputs are not finite; use another checkpoint"

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Scored:
    """Score of a continuation.

    Attributes:
        nats: sum of log p over its tokens, <= 0.
        is_greedy: whether every token was the most likely one.
    """

    nats: float
    is_greedy: bool


@torch.no_grad()
def score_pairs(
    model: HGRN2ForCausalLM, pairs: Sequence[Pair], num_rows: int, piece_tokens: int = PIECE_TOKENS
) -> Iterator[list[tuple[int, Scored]]]:
    """Predict every token of each continuation from all tokens before it.

    Continuations in a batch that share a context read it once. Apart from the tokens, memory does not depend on any
    length, except for the keys and values of attention layers in hybrids.

    Args:
        model: the model, in evaluation mode.
        pairs: token ids of contexts and continuations, at least one each.
        num_rows: pairs read at a time.
        piece_tokens: tokens per forward pass over all rows; does not change the result.

    Yields:
        For every batch, the indices of its pairs with their scores.

    Raises:
        UserError: the model's outputs are not finite.
    """
    # put equal contexts and similar lengths in one batch
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), list(pairs[i][0]), -len(pairs[i][1])))
    for start in range(0, len(order), num_rows):
        # longest first: finished rows are dropped from the end
        batch = sorted(order[start : start + num_rows], key=lambda i: -len(pairs[i][1]))
        nats, is_greedy = _score_batch(model, [pairs[i] for i in batch], piece_tokens)
        if not bool(nats.isfinite().all()):
            raise UserError(NOT_FINITE, "not-finite")
        yield [(i, Scored(*found)) for i, *found in zip(batch, nats.tolist(), is_greedy.tolist(), strict=True)]


def affordable_rows(model: HGRN2ForCausalLM, longest: int) -> int:
    """Return the number of rows whose states fit half of the free GPU memory, or one GiB on other devices.

    Args:
        model: the model, on its device.
        longest: tokens of the longest text; matters for layers with caches, such as attention.
    """
    config = model.config.model_config
    # selecting rows copies the states, so two exist for a moment
    caches = sum(cache.bytes_after(longest) for cache in cache_costs(config))
    bytes_per_row = 2 * (cost(config).state_bytes + caches)
    free = torch.cuda.mem_get_info(model.device)[0] // 2 if model.device.type == "cuda" else STATE_BYTES
    return max(1, min(MOST_ROWS, free // bytes_per_row))


def _score_batch(model: HGRN2ForCausalLM, pairs: Sequence[Pair], piece_tokens: int) -> tuple[Tensor, Tensor]:
    """Return nats [R] float64 and is_greedy [R] bool on the CPU; the longest continuation must come first."""
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    number = {context: i for i, context in enumerate(contexts)}
    # the last token of a context predicts the first one of the continuation, so they are read together
    cache = _read([context[:-1] for context in contexts], model, piece_tokens)
    _select(cache, torch.tensor([number[tuple(context)] for context, _ in pairs]))

    lengths = torch.tensor([len(continuation) for _, continuation in pairs])
    inputs = pad_sequence([torch.tensor([context[-1], *rest[:-1]]) for context, rest in pairs], batch_first=True)
    targets = pad_sequence([torch.tensor(rest) for _, rest in pairs], batch_first=True)
    nats = torch.zeros(len(pairs), dtype=torch.float64)
    is_greedy = torch.ones(len(pairs), dtype=torch.bool)
    start, rows = 0, len(pairs)
    while start < int(lengths[0]):
        left = int((lengths > start).sum())
        if left < rows:
            _select(cache, torch.arange(left))
            rows = left
        stop = start + max(1, piece_tokens // rows)
        x = model.model(inputs[:rows, start:stop].to(model.device), cache=cache, use_cache=True).last_hidden_state
        # tokens after the end of a row are padding
        real = torch.arange(start, start + x.shape[1]) < lengths[:rows, None]
        log_p, greedy = _log_p(model, x[real.to(x.device)], targets[:rows, start:stop][real].to(x.device))
        row = real.nonzero()[:, 0]
        nats.index_add_(0, row, log_p)
        is_greedy[row[~greedy]] = False
        start = stop
    return nats, is_greedy


def _read(texts: Sequence[Sequence[int]], model: HGRN2ForCausalLM, piece_tokens: int) -> DynamicCache:
    """Return the states after reading some texts, padded on the left; texts may be empty."""
    cache = DynamicCache(config=model.config)
    lengths = torch.tensor([len(text) for text in texts])
    longest = int(lengths.max())
    if longest == 0:
        return cache
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[longest - len(text) :] = torch.tensor(text, dtype=torch.long)
    mask = torch.arange(longest) >= longest - lengths[:, None]
    size = max(1, piece_tokens // len(texts))
    for part, real in zip(ids.split(size, 1), mask.split(size, 1), strict=True):
        model.model(part.to(model.device), real.to(model.device), cache=cache, use_cache=True)
    return cache


def _select(cache: DynamicCache, rows: Tensor) -> None:
    for layer in cache.layers:
        # layers stay transformers' own until something is read; contexts of one token read nothing
        if isinstance(layer, StateLayer):
            layer.batch_select_indices(rows)


def _log_p(model: HGRN2ForCausalLM, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return log p of the targets [M] given x [M, D] as float64 [M], and whether each is the argmax [M], on the CPU."""
    log_ps, greedy = [], []
    size = max(1, PIECE_LOGITS // model.config.vocab_size)
    for part, target in zip(x.split(size), targets.split(size), strict=True):
        logits = model.lm_head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_ps.append((logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)).cpu().double())
        greedy.append((logits.argmax(-1) == target).cpu())
    return torch.cat(log_ps), torch.cat(greedy)
