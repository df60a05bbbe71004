"""Answers in OpenAI's two forms, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from hgrn2.data.tokenizer import Tokenizer
from hgrn2.serve.http.choices import Choice, Part, chat_logprobs, completion_logprobs


class CompletionFormat:
    """Answers of /v1/completions.

    Args:
        model: name of the model.
        tokenizer: its tokenizer, or None.
        has_logprobs: whether log-probabilities are wanted.
        has_tokens: whether token ids are wanted.
    """

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer | None, has_logprobs: bool, has_tokens: bool):
        self.model, self.tokenizer = model, tokenizer
        self.has_logprobs, self.has_tokens = has_logprobs, has_tokens
        self.id = f"{self.prefix}-{secrets.token_hex(16)}"
        self.created = int(time.time())

    def first(self, index: int) -> list[dict[str, Any]]:
        """Return the chunks of a choice before its text."""
        return []

    def whole(self, choices: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """Return a whole answer."""
        found = []
        for choice in choices:
            one = self._text(choice.text) | {
                "index": choice.index, "logprobs": self._logprobs(choice), "finish_reason": choice.finish_reason,
            }  # fmt: skip
            found.append(one | self._extras(choice))
        return self._envelope(self.kind, found) | {"usage": usage}

    def chunk(self, part: Part, choice: Choice) -> dict[str, Any] | None:
        """Return a chunk; None if nothing is to be shown."""
        is_last = part.finish_reason is not None
        if not (part.text or part.entries or is_last):
            return None
        one = self._delta(part.text) | {
            "index": part.index, "logprobs": self._logprobs(part), "finish_reason": part.finish_reason,
        }  # fmt: skip
        if self.has_tokens:
            one["token_ids"] = [entry.token for entry in part.entries]
        if is_last and choice.session is not None:
            one["session"] = choice.session
        return self._envelope(self.chunk_kind, [one])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """Return the chunk of the counts."""
        return self._envelope(self.chunk_kind, []) | {"usage": usage}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _extras(self, choice: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.has_tokens:
            found["token_ids"] = [entry.token for entry in choice.entries]
        if choice.session is not None:
            found["session"] = choice.session
        return found

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return self._text(text)

    def _logprobs(self, part: Part | Choice) -> dict[str, Any] | None:
        return completion_logprobs(self.tokenizer, part.entries) if self.has_logprobs else None


class ChatFormat(CompletionFormat):
    """Answers of /v1/chat/completions."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def first(self, index: int) -> list[dict[str, Any]]:
        """Return the chunk that names the role."""
        delta = {"role": "assistant", "content": ""}
        one = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return [self._envelope(self.chunk_kind, [one])]

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, part: Part | Choice) -> dict[str, Any] | None:
        return chat_logprobs(self.tokenizer, part.entries) if self.has_logprobs else None
