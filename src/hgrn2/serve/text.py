"""Text in and out of the engine: encoding, text in whole characters, and texts that end a continuation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hgrn2.data.text_stream import TextStream
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError
from hgrn2.serve.engine import Engine
from hgrn2.serve.requests import FinishReason, Request, TokenEvent
from hgrn2.serve.sessions import Session

# enough context to encode the text that follows, and to decode its tokens
CONTEXT_TOKENS = 32


class StoppableText:
    """Text of tokens that arrive one by one, up to a text that ends it.

    A stop text may begin in one token and end in another. So the last characters are held back for as long as they
    may be the beginning of one; what was returned is never taken back.

    Args:
        tokenizer: the tokenizer.
        before: the last tokens before the text, as context for decoding.
        stop: texts that end it; they are not returned.
        after_text: whether text came before, even if its tokens decode to nothing.

    Attributes:
        is_stopped: whether a stop text was found.
        num_chars: characters of the tokens so far, with those held back.

    Raises:
        UserError: a stop text is empty.

    Example:
        >>> from hgrn2.data import ByteTokenizer
        >>> text = StoppableText(ByteTokenizer(), (), ["END"])
        >>> [text.push(token) for token in b"a ENTER END b"][:6], text.is_stopped
        (['', '', 'a', ' ', 'E', 'N'], True)
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str], after_text: bool = False):
        if "" in stop:
            raise UserError("generate: a stop text is empty; leave it out")
        # unknown tokens are text too, although they decode to nothing
        after_text = after_text or tokenizer.count_unknown(np.array(before, np.int64)) > 0
        self._stream = TextStream(tokenizer, before, after_text=after_text)
        self._stop = tuple(stop)
        # characters that may belong to the beginning of a stop text
        self._margin = max((len(text) - 1 for text in stop), default=0)
        self._held = ""
        self.is_stopped = False
        self.num_chars = 0

    def push(self, token: int) -> str:
        """Return the text that this token releases; often empty, and empty after a stop text."""
        if self.is_stopped:
            return ""
        self._add(self._stream.push(token))
        cut = self._find(self._held + self._stream.peek()) if self._stop else None
        if cut is not None:
            return cut
        free = max(len(self._held) - self._margin, 0)
        text, self._held = self._held[:free], self._held[free:]
        return text

    def flush(self) -> str:
        """Return the rest at the end, up to a stop text; an unfinished character becomes U+FFFD."""
        if self.is_stopped:
            return ""
        self._add(self._stream.flush())
        cut = self._find(self._held)
        text, self._held = self._held if cut is None else cut, ""
        return text

    def _add(self, text: str) -> None:
        self._held += text
        self.num_chars += len(text)

    def _find(self, text: str) -> str | None:
        """Return the text before the first stop text, or None if there is none."""
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if not found:
            return None
        self.is_stopped = True
        return text[: min(found)]


@dataclass(frozen=True)
class TextEvent:
    """Text of a continuation, with the token that released it.

    Attributes:
        token: what the engine reported about the token.
        text: whole characters; often empty.
        finish_reason: why the continuation ends here, "stop" for a stop text or an end token; None if it does not.
        offset: characters of the continuation before the token, with those that are held back.
    """

    token: TokenEvent
    text: str
    finish_reason: FinishReason | None = None
    offset: int = 0


class TextEngine:
    """Continue texts; the counterpart of `Engine` for one tokenizer.

    Args:
        engine: the engine, whose option vocab_size is the tokenizer's.
        tokenizer: the model's tokenizer; None for a model without one, which takes token ids and gives no text.

    Raises:
        UserError: the engine could draw ids that the tokenizer does not have.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None):
        if tokenizer is not None and engine.vocab_size > tokenizer.vocab_size:
            raise UserError(
                f"engine: draws from {engine.vocab_size} ids, the tokenizer has {tokenizer.vocab_size}; give "
                "EngineOptions(vocab_size=tokenizer.vocab_size)",
                "mismatch",
            )
        self.engine, self.tokenizer = engine, tokenizer
        self._texts: dict[tuple[int, int], StoppableText | None] = {}
        # requests whose sessions are kept, and sessions of texts that a stop text ended
        self._keeps: set[int] = set()
        self._sessions: dict[tuple[int, int], Session] = {}

    def encode(self, prompt: str, session: Session | None = None) -> list[int]:
        """Return the token ids of a prompt, with those that begin a text unless it continues one.

        Args:
            prompt: the text.
            session: text that it continues; None for a new one.

        Raises:
            UserError: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("prompt: the model has no tokenizer; give token ids", "unsupported")
        if session is None:
            return [*self.tokenizer.start_ids, *self.tokenizer.encode(prompt)]
        return self.tokenizer.continue_text(prompt, self.tokenizer.decode(session.tokens[-CONTEXT_TOKENS:]))

    def submit(
        self,
        prompt: str | Sequence[int],
        request: Request | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
    ) -> int:
        """Queue a request.

        Args:
            prompt: text or token ids to continue; with a session, those that follow what the session holds, which may
                be empty.
            request: its settings, whose tokens are ignored and whose stop_ids are those beside the tokenizer's end
                tokens; None for the defaults.
            stop: texts that end a continuation.
            session: text that the request continues; None for a new one.

        Returns:
            The number of the request, which its events carry.

        Raises:
            UserError: the prompt has no tokens, a stop text is empty or there is no tokenizer to find it with, or the
                engine refuses the request.
        """
        tokens = self.encode(prompt, session) if isinstance(prompt, str) else list(prompt)
        request = Request(tokens) if request is None else replace(request, tokens=tokens)
        tokenizer, texts = self.tokenizer, None
        if tokenizer is not None:
            request = replace(request, stop_ids=(*request.stop_ids, *tokenizer.end_ids))
            # a bad id would fail in the tokenizer with another error
            request.check(self.engine.vocab_size, session is None)
            context = [*([] if session is None else session.tokens), *tokens][-CONTEXT_TOKENS:]
            # tokens that begin a text are no text
            after_text = bool(prompt.strip()) if isinstance(prompt, str) else set(tokens) > set(tokenizer.start_ids)
            texts = [StoppableText(tokenizer, context, stop, after_text) for _ in range(request.n)]
        elif stop:
            raise UserError("stop: the model has no tokenizer; end it by stop token ids", "unsupported")
        number = self.engine.submit(request, session)
        self._texts |= {(number, i): None if texts is None else texts[i] for i in range(request.n)}
        if request.keep:
            self._keeps.add(number)
        return number

    def step(self) -> list[TextEvent]:
        """Run one step of the engine; continuations that reach a stop text end with it."""
        found = []
        for event in self.engine.step():
            key = (event.request_id, event.index)
            # the engine reports once more what a stop text has ended
            if key in self._texts:
                found.append(self._event(event, self._texts[key]))
                if found[-1].finish_reason is not None:
                    del self._texts[key]
                    if not self.running(event.request_id):
                        self._keeps.discard(event.request_id)
        return found

    def stream(
        self,
        prompt: str | Sequence[int],
        request: Request | None = None,
        stop: Sequence[str] = (),
        session: Session | None = None,
    ) -> Iterator[str]:
        """Run one request with n = 1 and yield its text; closing the iterator cancels it."""
        number = self.submit(prompt, request, stop, session)
        try:
            while (number, 0) in self._texts:
                for event in self.step():
                    if event.token.request_id == number and event.text:
                        yield event.text
        finally:
            if (number, 0) in self._texts:
                del self._texts[number, 0]
                self._keeps.discard(number)
                self.engine.cancel(number)

    def running(self, request_id: int) -> list[int]:
        """Return the continuations of a request that have not ended."""
        return [index for number, index in self._texts if number == request_id]

    def session(self, request_id: int, index: int = 0) -> Session:
        """Return the session of a continuation that ended, once, for a request with keep = True.

        After a stop text it holds the tokens of that text too.

        Raises:
            UserError: there is none.
        """
        found = self._sessions.pop((request_id, index), None)
        return self.engine.session(request_id, index) if found is None else found

    def _event(self, event: TokenEvent, text: StoppableText | None) -> TextEvent:
        reason, tokenizer = event.finish_reason, self.tokenizer
        if text is None or tokenizer is None:
            return TextEvent(event, "", reason)
        shown = event.token is not None and not (reason == "stop" and event.token in tokenizer.end_ids)
        offset = text.num_chars
        piece = text.push(event.token) if shown and event.token is not None else ""
        if text.is_stopped:
            if reason is None:
                self._end(event)
            return TextEvent(event, piece, "stop", offset)
        if reason is not None:
            piece += text.flush()
            reason = "stop" if text.is_stopped else reason
        return TextEvent(event, piece, reason, offset)

    def _end(self, event: TokenEvent) -> None:
        """End a continuation that reached a stop text."""
        key = (event.request_id, event.index)
        if event.request_id in self._keeps:
            with contextlib.suppress(UserError):
                # it may have ended in a step that ran ahead
                self._sessions[key] = self.engine.pause(*key)
        else:
            self.engine.cancel(*key)
