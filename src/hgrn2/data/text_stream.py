"""Decode tokens to text one at a time, in complete characters."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from hgrn2.data.tokenizer import Tokenizer

# the text of a token may depend on this many tokens before it
_CONTEXT_TOKENS = 32


class TextStream:
    """Decode token by token and return only text that later tokens cannot change.

    Args:
        tokenizer: the tokenizer that decodes.
        before: tokens that the text continues, such as those of a prompt. Many vocabularies include the space before a
            word in its token; it is dropped at the start of a text and kept in the middle.
        after_text: text came before, even if its tokens decode to nothing, as unknown tokens do.

    Example:
        >>> from hgrn2.data import ByteTokenizer
        >>> stream = TextStream(ByteTokenizer())
        >>> [stream.push(i) for i in "é".encode()]
        ['', 'é']
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), *, after_text: bool = False):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # for tokens whose text depends on their neighbours: the tokens already returned, and those still held back
        self._context: list[int] = []
        self._waiting: list[int] = []
        self._after_text = after_text
        for token_id in before[-_CONTEXT_TOKENS:]:
            # a character may start in the context and end in this stream
            self.push(token_id)
        self._take_context()
        self._is_new = True

    def push(self, token_id: int) -> str:
        """Return the text that this token completes; often empty."""
        self._is_new = False
        try:
            data = self._tokenizer.token_bytes(int(token_id))
        except ValueError:
            # an untrained model may sample ids from the padding of its vocabulary
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
        """Return the held-back text as it would read if no token followed."""
        return self._fresh_text()

    def flush(self) -> str:
        """Return the rest of the text at the end; an unfinished character becomes U+FFFD."""
        text = self._fresh_text() + self._utf8.decode(b"", final=True)
        self._take_context()
        self._utf8.reset()
        # a character left unfinished by the context does not belong to this stream
        return "" if self._is_new else text

    def _take_context(self) -> None:
        self._context = (self._context + self._waiting)[-_CONTEXT_TOKENS:]
        self._waiting = []

    def _fresh_text(self) -> str:
        if not self._waiting:
            return ""
        # if the text before has no decodable tokens, decode these as if they followed themselves
        context = self._context or (self._waiting if self._after_text else [])
        before = self._tokenizer.decode(context)
        return self._tokenizer.decode(context + self._waiting)[len(before) :]
