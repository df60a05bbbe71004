"""Completions over HTTP: admission, limits of time, whole answers and streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hgrn2.errors import UserError
from hgrn2.serve.chat import ChatFormat as ChatPrompt
from hgrn2.serve.http.choices import Choice, Part
from hgrn2.serve.http.engine_thread import EngineThread, Stream
from hgrn2.serve.http.errors import ApiError, api_error
from hgrn2.serve.http.formats import ChatFormat, CompletionFormat
from hgrn2.serve.http.metrics import Metrics
from hgrn2.serve.http.options import ServerOptions
from hgrn2.serve.http.schema import ChatBody, CompletionBody, Settings
from hgrn2.serve.http.session_store import SessionStore
from hgrn2.serve.sessions import Session
from hgrn2.serve.text import TextEngine

# what OpenAI's interface names as the default of /v1/completions
_DEFAULT_TOKENS = 16


@dataclass
class Call:
    """A request while it runs.

    Attributes:
        format: form of the answer.
        settings: the body.
        stream: what the engine writes.
        choices: the continuations.
        num_prompt_tokens: tokens of all prompts.
        started: when it arrived, in seconds of `time.monotonic`.
        first: when its first token was there; None before.
        is_released: whether it no longer counts as open.
    """

    format: CompletionFormat
    settings: Settings
    stream: Stream
    choices: list[Choice]
    num_prompt_tokens: int
    started: float = field(default_factory=time.monotonic)
    first: float | None = None
    is_released: bool = False

    @property
    def usage(self) -> dict[str, int]:
        """Tokens read and written so far."""
        written = sum(choice.num_tokens for choice in self.choices)
        read = self.num_prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class CompletionServer:
    """Answers completions with an engine.

    Args:
        engine: the engine with its tokenizer.
        options: options.

    Attributes:
        is_draining: whether new work is refused.

    Raises:
        UserError: the tokenizer's chat template cannot be read, or the folder of sessions cannot be made.
    """

    def __init__(self, engine: TextEngine, options: ServerOptions):
        self.options, self.engine = options, engine
        self.tokenizer = engine.tokenizer
        self.thread = EngineThread(engine)
        self.sessions = SessionStore(options.session_bytes, options.session_folder)
        self.metrics = Metrics(lambda: self.thread.state)
        self.is_draining = False
        self._chat = None if self.tokenizer is None else ChatPrompt(self.tokenizer)
        self._calls: dict[str, Call] = {}
        self._num_open = 0

    async def start_completion(self, body: CompletionBody) -> Call:
        """Submit a request of /v1/completions.

        Raises:
            ApiError: it is refused.
        """
        self._check_model(body.model)
        prompts, session = body.prompts(), await self._session(body)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, "best_of: only n is supported", "unsupported", "best_of")
        if session is None and not all(prompts):
            raise ApiError(400, f"prompt is empty; {self._how_to_begin()}", "invalid-value", "prompt")
        with self._admitted(len(prompts) * (body.n or 1)) as slot:
            tokens = [await self._tokens(prompt, session) for prompt in prompts]
            has_tokens = bool(body.return_token_ids) or self.tokenizer is None
            form = CompletionFormat(self.options.name, self.tokenizer, body.logprobs is not None, has_tokens)
            return await self._start(form, body, tokens, (), session, _DEFAULT_TOKENS, slot)

    async def start_chat(self, body: ChatBody) -> Call:
        """Submit a request of /v1/chat/completions.

        Raises:
            ApiError: it is refused.
        """
        self._check_model(body.model)
        if self._chat is None:
            raise ApiError(400, "the model has no tokenizer, so it cannot chat", "unsupported")
        if body.session is not None:
            raise ApiError(400, "session: continue it with /v1/completions", "unsupported", "session")
        chat, messages = self._chat, [{"role": one.role, "content": one.text} for one in body.messages]
        with self._admitted(body.n or 1) as slot:
            try:
                tokens = await asyncio.to_thread(chat.encode, messages)
            except UserError as error:
                raise api_error(error, "messages") from None
            form = ChatFormat(self.options.name, self.tokenizer, bool(body.logprobs), bool(body.return_token_ids))
            return await self._start(form, body, [tokens], chat.stop, None, self.options.max_tokens, slot)

    async def answer(self, call: Call) -> dict[str, Any]:
        """Return the whole answer.

        Raises:
            ApiError: the limit of time was reached before the first token, or the model's outputs are not finite.
        """
        async with contextlib.aclosing(self._parts(call)) as parts:
            async for _ in parts:
                pass
        return call.format.whole(call.choices, call.usage)

    async def chunks(self, call: Call) -> AsyncGenerator[bytes, None]:
        """Yield the answer as server-sent events. The first waits for a token, so that a refusal has its status.

        Raises:
            ApiError: before the first event, as `answer`.
        """
        wants_usage = call.settings.stream_options is not None and call.settings.stream_options.include_usage
        is_first = True
        try:
            async with contextlib.aclosing(self._parts(call)) as parts:
                async for part in parts:
                    if is_first:
                        for choice in call.choices:
                            for chunk in call.format.first(choice.index):
                                yield _event(chunk)
                        is_first = False
                    chunk = call.format.chunk(part, call.choices[part.index])
                    if chunk is not None:
                        yield _event(chunk)
        except ApiError as error:
            if is_first:
                raise
            yield _event(error.body)
            return
        if wants_usage:
            yield _event(call.format.usage(call.usage))
        yield b"data: [DONE]\n\n"

    async def pause(self, name: str) -> list[str]:
        """End a running request, and return the names of the sessions of its continuations.

        Raises:
            ApiError: it is not running.
        """
        call = self._calls.get(name)
        if call is None:
            raise ApiError(404, f"request {name[:64]!r} is not running", "not-found")
        found = await self.thread.pause(call.stream)
        names = [self.sessions.add(session) for _, session in sorted(found.items())]
        return [name for name in names if name is not None]

    async def _start(
        self,
        form: CompletionFormat,
        body: Settings,
        tokens: Sequence[Sequence[int]],
        stop: Sequence[str],
        session: Session | None,
        default_tokens: int,
        slot: _Slot,
    ) -> Call:
        most = self.options.max_tokens
        wanted = min(default_tokens, most) if body.most_tokens is None else body.most_tokens
        if wanted > most:
            raise ApiError(400, f"max_tokens is {wanted}; wanted at most {most}", "invalid-value", "max_tokens")
        for one in tokens:
            if len(one) > self.options.max_prompt_tokens:
                raise ApiError(
                    400, f"the prompt has {len(one)} tokens; wanted at most {self.options.max_prompt_tokens}",
                    "context_length_exceeded", "prompt",
                )  # fmt: skip
        self._check_ids(body, tokens)
        try:
            stream = await self.thread.submit(tokens, body.request(wanted), (*stop, *body.stops), session)
        except UserError as error:
            raise api_error(error) from None
        ends = frozenset() if self.tokenizer is None else self.tokenizer.end_ids
        has_text = self.tokenizer is not None
        choices = [Choice(i, ends, has_text) for i in range(stream.num_open)]
        call = Call(form, body, stream, choices, sum(map(len, tokens)))
        self._calls[form.id] = call
        slot.call = call
        return call

    async def _parts(self, call: Call) -> AsyncGenerator[Part, None]:
        """Yield what the continuations add, until all have ended; closing the iterator ends them."""
        n = call.settings.n or 1
        timer = asyncio.get_running_loop().call_later(self.options.max_seconds, self._time_out, call)
        try:
            while (piece := await call.stream.next()) is not None:
                choice = call.choices[piece.prompt * n + piece.event.token.index]
                part = choice.add(piece)
                if piece.event.finish_reason == "not-finite":
                    raise ApiError(500, "the model's outputs are not finite; serve another checkpoint", "not-finite")
                if call.first is None and choice.num_tokens:
                    call.first = time.monotonic()
                if call.first is None and part.is_cut_off:
                    raise self._no_time()
                if piece.session is not None and call.settings.keep:
                    choice.session = self.sessions.add(piece.session)
                yield part
        except UserError as error:
            raise api_error(error) from None
        finally:
            timer.cancel()
            self.end(call)

    def end(self, call: Call) -> None:
        """End a call whose answer has no reader any more; one that has ended is left alone."""
        if self._calls.pop(call.format.id, None) is None:
            return
        if call.stream.num_open:
            self.metrics.abandoned.inc()
        self.thread.leave(call.stream)
        self._release(call)
        now, first = time.monotonic(), None if call.first is None else call.first - call.started
        self.metrics.observe(now - call.started, first, call.usage["completion_tokens"], len(call.choices))

    def _time_out(self, call: Call) -> None:
        self.thread.cancel(call.stream)
        # a client that does not read must not keep others out
        self._release(call)

    def _release(self, call: Call) -> None:
        if not call.is_released:
            call.is_released = True
            self._num_open -= len(call.choices)

    def _no_time(self) -> ApiError:
        return ApiError(
            503, "the server had no time for this request; try again later", "timeout",
            headers={"Retry-After": str(self._retry_after())},
        )  # fmt: skip

    def _retry_after(self) -> int:
        rows = max(self.engine.engine.options.max_batch, 1)
        return min(max(math.ceil(self.metrics.mean_seconds * self._num_open / rows), 1), 60)

    def _admitted(self, count: int) -> _Slot:
        """Count a request's continuations as open, or refuse it."""
        if count > self.options.max_choices:
            raise ApiError(
                400, f"{count} continuations, prompts times n; wanted at most {self.options.max_choices}",
                "invalid-value", "n",
            )  # fmt: skip
        room = self.engine.engine.options.max_batch + self.options.max_waiting
        if self._num_open + count > room:
            raise ApiError(
                429, f"{self._num_open} continuations run or wait; try again later", "queue-full",
                headers={"Retry-After": str(self._retry_after())},
            )  # fmt: skip
        if not self.thread.is_alive:
            raise ApiError(503, f"the engine has ended: {self.thread.failure!r}", "unavailable")
        self._num_open += count
        return _Slot(self, count)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.options.name:
            raise ApiError(
                404, f"model {name[:100]!r} does not exist; this server has {self.options.name!r}", "model_not_found",
                "model",
            )  # fmt: skip

    def _check_ids(self, body: Settings, prompts: Sequence[Sequence[int]]) -> None:
        size = self.engine.engine.vocab_size
        for name, ids in [*(("prompt", one) for one in prompts), ("stop_token_ids", body.stop_token_ids or ())]:
            for token in ids:
                if not 0 <= token < size:
                    raise ApiError(
                        400, f"{name}: token {str(token)[:20]} is outside the vocabulary, 0 to {size - 1}",
                        "invalid-value", name,
                    )  # fmt: skip

    async def _session(self, body: Settings) -> Session | None:
        return None if body.session is None else await asyncio.to_thread(self.sessions.get, body.session)

    async def _tokens(self, prompt: str | list[int], session: Session | None) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        try:
            return await asyncio.to_thread(self.engine.encode, prompt, session)
        except UserError as error:
            raise api_error(error, "prompt") from None

    def _how_to_begin(self) -> str:
        if self.tokenizer is None or not self.tokenizer.start_ids:
            return "give at least one token"
        return f"give a text, or the token that begins one: {list(self.tokenizer.start_ids)}"


class _Slot:
    """Room of a request that is being admitted; given back unless the request started."""

    def __init__(self, server: CompletionServer, count: int):
        self.server, self.count = server, count
        self.call: Call | None = None

    def __enter__(self) -> _Slot:
        return self

    def __exit__(self, *_: object) -> None:
        if self.call is None:
            self.server._num_open -= self.count


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
