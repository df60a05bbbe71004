"""How likely continuations of any length are after contexts of any length: read in pieces, with the state carried."""

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
from hgrn2.models.cost import cost

# of all rows together, read at a time: bounds the memory, not the texts
PIECE_TOKENS = 4096
# logits that exist at a time, 64 MB of them in float32
PIECE_LOGITS = 2**24
# rows that are chosen when none are asked for, and the memory that their states may take where it is not known
MOST_ROWS = 64
STATE_BYTES = 2**30
# what a model is refused with, here and where it writes
NOT_FINITE = "the model's outputs are not finite; use another checkpoint"

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Scored:
    """How likely a continuation is.

    Attributes:
        nats: log p of all its tokens, summed; 0 or below.
        is_greedy: whether each of them was the likeliest.
    """

    nats: float
    is_greedy: bool


@torch.no_grad()
def score_pairs(
    model: HGRN2ForCausalLM, pairs: Sequence[Pair], num_rows: int, piece_tokens: int = PIECE_TOKENS
) -> Iterator[list[tuple[int, Scored]]]:
    """Predicts every token of each continuation from all tokens before it.

    A context that several continuations share is read once for those of a batch. Beside the tokens themselves, what is
    held at a time does not depend on any length (but for the keys and values of attention layers in hybrids).

    Args:
        model: in evaluation mode.
        pairs: token ids of context and continuation, one or more each.
        num_rows: pairs read at a time.
        piece_tokens: tokens of a forward pass, those of all rows together; does not change the result.

    Yields:
        After every batch, the numbers of its pairs and what came out.

    Raises:
        UserError: the model's outputs are not finite.
    """
    # what belongs together in one batch: the same contexts, and nearly equal lengths
    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs[i][0]), list(pairs[i][0]), -len(pairs[i][1])))
    for start in range(0, len(order), num_rows):
        # rows that end leave from the back
        batch = sorted(order[start : start + num_rows], key=lambda i: -len(pairs[i][1]))
        nats, is_greedy = _score_batch(model, [pairs[i] for i in batch], piece_tokens)
        if not bool(nats.isfinite().all()):
            raise UserError(NOT_FINITE, "not-finite")
        yield [(i, Scored(*found)) for i, *found in zip(batch, nats.tolist(), is_greedy.tolist(), strict=True)]


def affordable_rows(model: HGRN2ForCausalLM, longest: int) -> int:
    """How many rows to read at a time: their states fit half of the GPU memory that is free, elsewhere a GiB.

    Args:
        model: on its device.
        longest: tokens of the longest text; matters where attention layers keep something of each.
    """
    costs = cost(model.config.model_config)
    window = model.config.sliding_window
    kept = longest if window is None else min(longest, window)
    # states are selected and replaced, so there are two of them for a moment
    bytes_per_row = 2 * (costs.state_bytes + kept * costs.attention_bytes_per_token)
    free = torch.cuda.mem_get_info(model.device)[0] // 2 if model.device.type == "cuda" else STATE_BYTES
    return max(1, min(MOST_ROWS, free // bytes_per_row))


def _score_batch(model: HGRN2ForCausalLM, pairs: Sequence[Pair], piece_tokens: int) -> tuple[Tensor, Tensor]:
    """What is scored: nats [R] float64 and is_greedy [R] bool, on the CPU; the longest continuation comes first."""
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    number = {context: i for i, context in enumerate(contexts)}
    # a context's last token is read with the continuation, whose first it predicts
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
        # what follows the end of a row is read for the shape's sake
        real = torch.arange(start, start + x.shape[1]) < lengths[:rows, None]
        log_p, greedy = _log_p(model, x[real.to(x.device)], targets[:rows, start:stop][real].to(x.device))
        row = real.nonzero()[:, 0]
        nats.index_add_(0, row, log_p)
        is_greedy[row[~greedy]] = False
        start = stop
    return nats, is_greedy


def _read(texts: Sequence[Sequence[int]], model: HGRN2ForCausalLM, piece_tokens: int) -> DynamicCache:
    """The states behind some texts; shorter ones, and those of no tokens, are filled up on the left."""
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
        # transformers' own until something was read, which no context of one token is
        if isinstance(layer, StateLayer):
            layer.batch_select_indices(rows)


def _log_p(model: HGRN2ForCausalLM, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """For targets [M] after x [M, D]: log p [M] float64, and whether it is the likeliest [M] bool, on the CPU."""
    log_ps, greedy = [], []
    size = max(1, PIECE_LOGITS // model.config.vocab_size)
    for part, target in zip(x.split(size), targets.split(size), strict=True):
        logits = model.lm_head(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_ps.append((logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(-1)).cpu().double())
        greedy.append((logits.argmax(-1) == target).cpu())
    return torch.cat(log_ps), torch.cat(greedy)
