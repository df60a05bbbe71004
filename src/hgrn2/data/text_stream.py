"""Tokens to text as they come, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from hgrn2.data.tokenizer import Tokenizer

# tokens before the first one that its text may depend on
_CONTEXT_TOKENS = 32


class TextStream:
    """Decodes token by token and hands out what no later token can change: complete characters only.

    Args:
        tokenizer: decodes.
        before: tokens that the text continues, such as a prompt's. Many vocabularies mark words by the space before:
            a text begins without that space and continues with it.
        after_text: there was text before, even if its tokens decode to nothing, as unknown words do.

    Example:
        >>> from hgrn2.data import ByteTokenizer
        >>> stream = TextStream(ByteTokenizer())
        >>> [stream.push(i) for i in "é".encode()]
        ['', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), *, after_text: bool = False):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # for tokens whose text depends on their neighbours: what was handed out last, and what still waits
        self._context: list[int] = []
        self._waiting: list[int] = []
        self._after_text = after_text
        for token_id in before[-_CONTEXT_TOKENS:]:
            # a character may begin there and end here
            self.push(token_id)
        self._take_context()
        self._is_new = True

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; often empty."""
        self._is_new = False
        try:
            data = self._tokenizer.token_bytes(int(token_id))
        except ValueError:
            # an untrained model with a padded vocabulary may say anything
            data = "\ufffd".encode()
        if data is not None:
            return self._utf8.decode(data)
        self._waiting.append(int(token_id))
        if self._tokenizer.is_inside_run(int(token_id)):
            return ""
        text = self._fresh_text()
        if text.endswith("\ufffd") and len(self._waiting) < _CONTEXT_TOKENS:
            return ""
        self._take_context()
        return text

    def peek(self) -> str:
        """Return the text that is held back, as it would be if nothing followed."""
        return self._fresh_text()

    def flush(self) -> str:
        """Return the rest of the text at the end; an unfinished character becomes U+FFFD."""
        text = self._fresh_text() + self._utf8.decode(b"", final=True)
        self._take_context()
        self._utf8.reset()
        # an unfinished character from before the first token does not belong to this stream
        return "" if self._is_new else text

    def _take_context(self) -> None:
        self._context = (self._context + self._waiting)[-_CONTEXT_TOKENS:]
        self._waiting = []

    def _fresh_text(self) -> str:
        if not self._waiting:
            return ""
        # after text that leaves no token to decode, they are spelt as after themselves
        context = self._context or (self._waiting if self._after_text else [])
        before = self._tokenizer.decode(context)
        return self._tokenizer.decode(context + self._waiting)[len(before) :]
