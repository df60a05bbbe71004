"""Continuations as they are written: text, tokens and log-probabilities that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hgrn2.data.tokenizer import Tokenizer
from hgrn2.serve.http.engine_thread import Piece


@dataclass(frozen=True)
class TokenEntry:
    """A token of a continuation.

    Attributes:
        token: its id.
        offset: characters of the continuation before it.
        logprob: its log-probability, if wanted.
        top_logprobs: the likeliest tokens with theirs.
    """

    token: int
    offset: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass
class Part:
    """Addition of a piece to a choice.

    Attributes:
        index: number of the choice.
        text: text that is released.
        entries: tokens whose text begins in what was released.
        finish_reason: "stop" or "length" at the end.
        is_cut_off: whether the continuation ended because it was cancelled.
    """

    index: int
    text: str
    entries: list[TokenEntry]
    finish_reason: str | None = None
    is_cut_off: bool = False


@dataclass
class Choice:
    """A continuation.

    Attributes:
        index: its number.
        end_ids: tokens that end a text, which are not part of it.
        has_text: whether tokens have a text.
        text: text so far.
        entries: tokens whose text begins in it.
        num_tokens: tokens written, the one that ended the text included.
        finish_reason: "stop" or "length"; None while it runs.
        session: name of its session; None for none.
    """

    index: int
    end_ids: frozenset[int] = frozenset()
    has_text: bool = True
    text: str = ""
    entries: list[TokenEntry] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None
    session: str | None = None
    _held: list[TokenEntry] = field(default_factory=list)

    def add(self, piece: Piece) -> Part:
        """Add a piece, and return what can be shown of it."""
        event = piece.event
        token, reason = event.token, event.finish_reason
        if token.token is not None:
            self.num_tokens += 1
            if not (token.finish_reason == "stop" and token.token in self.end_ids):
                self._held.append(TokenEntry(token.token, event.offset, token.logprob, token.top_logprobs))
        self.text += event.text
        count = len(self._held)
        if self.has_text and reason in (None, "stop"):
            # a token waits for its text; the tokens of a stop text are never shown
            count = sum(entry.offset < len(self.text) for entry in self._held)
        shown, self._held = self._held[:count], self._held[count:]
        self.entries += shown
        if reason is not None:
            # cancelled by a limit of time, by a pause, or as the server ends
            self.finish_reason = "stop" if reason == "stop" else "length"
        return Part(self.index, event.text, shown, self.finish_reason, reason == "cancelled")


def token_text(tokenizer: Tokenizer | None, token: int) -> tuple[str, list[int] | None]:
    """Return the text and the bytes of a token alone; bytes that are not UTF-8 as OpenAI writes them.

    Args:
        tokenizer: the tokenizer; None gives the id as text.
        token: the id.
    """
    if tokenizer is None:
        return str(token), None
    try:
        data = tokenizer.token_bytes(token)
    except ValueError:
        data = b""
    if data is None:
        text = tokenizer.decode([token])
        return text, list(text.encode())
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)


def completion_logprobs(tokenizer: Tokenizer | None, entries: Sequence[TokenEntry]) -> dict[str, Any]:
    """Return log-probabilities in the form of /v1/completions."""
    return {
        "tokens": [token_text(tokenizer, entry.token)[0] for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{token_text(tokenizer, t)[0]: p for t, p in entry.top_logprobs} for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def chat_logprobs(tokenizer: Tokenizer | None, entries: Sequence[TokenEntry]) -> dict[str, Any]:
    """Return log-probabilities in the form of /v1/chat/completions."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        text, data = token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": data}

    content = [
        {**one(entry.token, entry.logprob), "top_logprobs": [one(t, p) for t, p in entry.top_logprobs]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}
