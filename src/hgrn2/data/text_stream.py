"""Tokens to text as they come, never half a character."""

from __future__ import annotations

import codecs

from hgrn2.data.tokenizer import Tokenizer


class TextStream:
    """Decodes token by token and hands out complete characters only.

    Example:
        >>> from hgrn2.data import ByteTokenizer
        >>> stream = TextStream(ByteTokenizer())
        >>> [stream.push(i) for i in "é".encode()]
        ['', 'é']
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # for tokens whose text depends on their neighbours: what was handed out last, and what still waits
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; often empty."""
        try:
            data = self._tokenizer.token_bytes(int(token_id))
        except ValueError:
            # an untrained model with a padded vocabulary may say anything
            data = "\ufffd".encode()
        if data is not None:
            return self._utf8.decode(data)
        self._waiting.append(int(token_id))
        text = self._fresh_text()
        if text.endswith("\ufffd"):
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """What is left at the end; an unfinished character becomes U+FFFD."""
        text = self._fresh_text() + self._utf8.decode(b"", final=True)
        self._context, self._waiting = [], []
        self._utf8.reset()
        return text

    def _fresh_text(self) -> str:
        if not self._waiting:
            return ""
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting)[len(before) :]
