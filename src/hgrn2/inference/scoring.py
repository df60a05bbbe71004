"""Perplexity and bits per byte of texts of any length, in constant memory unless the model has full attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hgrn2.data.documents import Document
from hgrn2.data.pieces import Piece, cut_document, keeps_text, piece_tokens
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError
from hgrn2.models import HGRN2LM
from hgrn2.quantities import perplexity

WINDOW_TOKENS = 2048
# number of unknown parts of a text that are named
_NAMED_UNKNOWN = 5


@dataclass(frozen=True)
class Score:
    """Quality of a model's predictions of a text.

    Attributes:
        name: name of the text.
        nats: sum of -log p over its tokens and the end-of-text token.
        num_tokens: number of predicted tokens.
        num_bytes: UTF-8 bytes of the text.
        num_unknown: number of unknown tokens, which replace text that the vocabulary lacks.
        unknown: the first few distinct parts of the text that the vocabulary lacks.
        keeps_text: whether decoding the tokens restores the text.
    """

    name: str
    nats: float
    num_tokens: int
    num_bytes: int
    num_unknown: int = 0
    unknown: tuple[str, ...] = ()
    keeps_text: bool = True

    @property
    def perplexity(self) -> float:
        """exp(nats per token); inf if it does not fit a float."""
        return perplexity(self.nats / self.num_tokens)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte, comparable between tokenizers and with compressors; None if the tokens lose text."""
        return self.nats / math.log(2) / self.num_bytes if self.keeps_text else None

    def to_dict(self) -> dict[str, Any]:
        """Return the score as JSON values; None for values that are not available or not finite."""
        return {
            "name": self.name, "nats": self.nats, "num_tokens": self.num_tokens, "num_bytes": self.num_bytes,
            "num_unknown": self.num_unknown, "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "bits_per_byte": self.bits_per_byte,
        }  # fmt: skip

    def losses(self) -> str | None:
        """Return one line about text that the tokenizer lost; None if it lost nothing."""
        if self.num_unknown:
            some = ", ".join(map(repr, self.unknown))
            one = self.num_unknown == 1
            lost = f"{self.num_unknown:,} token{'' if one else 's'} stand{'s' if one else ''} for text that the "
            lost += f"tokenizer does not know{f' ({some}, ...)' if some else ''}"
        elif not self.keeps_text:
            lost = "the tokenizer changes the text (letter case, spaces or line ends)"
        else:
            return None
        return f"{self.name}: {lost}; bits per byte are not available, and perplexity is of what is left"


@torch.no_grad()
def score(
    model: HGRN2LM,
    tokenizer: Tokenizer,
    document: Document,
    window: int = WINDOW_TOKENS,
    on_bytes: Callable[[int], None] | None = None,
) -> Score:
    """Predict every token of a text from all tokens before it.

    Args:
        model: the model, in evaluation mode.
        tokenizer: the model's tokenizer.
        document: the text with its name; its pieces are read as needed.
        window: tokens per forward pass; the state is carried between windows, so it does not change the result.
        on_bytes: called with the number of UTF-8 bytes of each piece read.

    Raises:
        UserError: the text is empty.
    """
    device = model.lm_head.weight.device
    reader = _Reader(tokenizer, document.pieces, on_bytes)
    nats, num_tokens, state = 0.0, 0, None
    for ids in reader.windows(window):
        tokens = torch.tensor([ids], device=device)
        found = model.loss(tokens[:, :-1], tokens[:, 1:], state)
        nats, state = nats + float(found[0]), found[2]
        num_tokens += tokens.shape[1] - 1
    if reader.num_bytes == 0:
        raise UserError(f"{document.name}: no text in it; name another file", "unreadable")
    if not math.isfinite(nats):
        raise UserError(
            f"{document.name}: the loss is {nats}; the model's weights are not finite, use another checkpoint",
            "not-finite",
        )
    return Score(
        document.name, nats, num_tokens, reader.num_bytes, reader.num_unknown, tuple(reader.unknown),
        reader.keeps_text and not reader.num_unknown,
    )  # fmt: skip


def total(scores: Iterable[Score], name: str = "total") -> Score:
    """Add up the scores of several texts."""
    scores = list(scores)
    unknown = dict.fromkeys(part for s in scores for part in s.unknown)
    return Score(
        name,
        sum(s.nats for s in scores),
        sum(s.num_tokens for s in scores),
        sum(s.num_bytes for s in scores),
        sum(s.num_unknown for s in scores),
        tuple(unknown)[:_NAMED_UNKNOWN],
        all(s.keeps_text for s in scores),
    )


class _Reader:
    """Encode a text in windows of tokens and count bytes and unknown tokens."""

    def __init__(self, tokenizer: Tokenizer, blocks: Iterable[str], on_bytes: Callable[[int], None] | None):
        self._tokenizer, self._blocks, self._on_bytes = tokenizer, blocks, on_bytes
        self.num_bytes = self.num_unknown = 0
        self.unknown: dict[str, None] = {}
        self.keeps_text = True

    def windows(self, window: int) -> Iterator[list[int]]:
        """Yield windows of window + 1 tokens that overlap by one, from the start tokens to the end-of-text token."""
        waiting = list(self._tokenizer.start_ids)
        for piece in cut_document(self._tokenizer, self._blocks):
            waiting.extend(self._read(piece))
            while len(waiting) > window:
                yield waiting[: window + 1]
                waiting = waiting[window:]
        waiting.append(self._tokenizer.eot_id)
        for start in range(0, len(waiting) - 1, window):
            yield waiting[start : start + window + 1]

    def _read(self, piece: Piece) -> list[int]:
        ids = piece_tokens(self._tokenizer, [piece])[0]
        num_unknown = self._tokenizer.count_unknown(ids)
        if num_unknown and len(self.unknown) < _NAMED_UNKNOWN:
            for part in self._tokenizer.unknown_parts(piece.text):
                if len(self.unknown) < _NAMED_UNKNOWN:
                    self.unknown[part] = None
        self.num_unknown += num_unknown
        self.keeps_text = self.keeps_text and keeps_text(self._tokenizer, piece, ids)
        num_bytes = len(piece.text.encode("utf-8"))
        self.num_bytes += num_bytes
        if self._on_bytes is not None:
            self._on_bytes(num_bytes)
        return ids.tolist()
