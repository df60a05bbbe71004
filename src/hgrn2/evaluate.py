"""Perplexity and bits a byte of texts of any length, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from hgrn2.data.documents import Document
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError
from hgrn2.models import HGRN2LM

WINDOW_TOKENS = 2048


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        name: the text's.
        nats: summed over its tokens and the end-of-text token.
        num_tokens: what was predicted.
        num_bytes: UTF-8 bytes of the text.
    """

    name: str
    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(nats a token); inf where that does not fit a float."""
        mean = self.nats / self.num_tokens
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, and with a compressor's output."""
        return self.nats / math.log(2) / self.num_bytes


@torch.no_grad()
def score(model: HGRN2LM, tokenizer: Tokenizer, document: Document, window: int = WINDOW_TOKENS) -> Score:
    """Predicts every token of a text from all tokens before it.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        document: a name and the text in pieces, read as they are needed.
        window: tokens of a forward pass; the state goes from window to window, so it does not change the result.

    Raises:
        UserError: the text is empty.
    """
    device = model.lm_head.weight.device
    counter = _Counter(document.pieces)
    nats, num_tokens, state = 0.0, 0, None
    for ids in _windows(counter, tokenizer, window):
        tokens = torch.tensor([ids], device=device)
        loss, _, state = model.loss(tokens[:, :-1], tokens[:, 1:], state)
        nats += float(loss)
        num_tokens += tokens.shape[1] - 1
    if counter.num_bytes == 0:
        raise UserError(f"{document.name}: no text in it; name another file")
    if not math.isfinite(nats):
        raise UserError(
            f"{document.name}: the loss is {nats}; the model's weights are not finite, use another checkpoint"
        )
    return Score(document.name, nats, num_tokens, counter.num_bytes)


def total(scores: Iterable[Score]) -> Score:
    """All texts together."""
    scores = list(scores)
    return Score(
        "total",
        sum(s.nats for s in scores),
        sum(s.num_tokens for s in scores),
        sum(s.num_bytes for s in scores),
    )


class _Counter:
    """Hands pieces on and counts their bytes."""

    def __init__(self, pieces: Iterable[str]):
        self.pieces, self.num_bytes = pieces, 0

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            self.num_bytes += len(piece.encode("utf-8"))
            yield piece


def _windows(pieces: Iterable[str], tokenizer: Tokenizer, window: int) -> Iterator[list[int]]:
    """Runs of window + 1 tokens that overlap by one, from the end-of-text token before the text to the one after."""
    waiting = [tokenizer.eot_id]
    for piece in pieces:
        waiting.extend(tokenizer.encode(piece))
        while len(waiting) > window:
            yield waiting[: window + 1]
            waiting = waiting[window:]
    waiting.append(tokenizer.eot_id)
    for start in range(0, len(waiting) - 1, window):
        yield waiting[start : start + window + 1]
