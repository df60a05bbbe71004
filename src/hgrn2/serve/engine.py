"""The engine: many requests at once, each with a state of constant size."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from hgrn2.errors import UserError
from hgrn2.models import HGRN2LM
from hgrn2.models.cost import cost
from hgrn2.serve.decoding import DecodeStep
from hgrn2.serve.graphs import DecodeGraphs
from hgrn2.serve.options import EngineOptions
from hgrn2.serve.pool import StatePool
from hgrn2.serve.prefill import PackedPrefill
from hgrn2.serve.prefix_cache import PrefixCache
from hgrn2.serve.prompts import PromptReader
from hgrn2.serve.requests import Continuation, FinishReason, Prompt, Request, Running, TokenEvent, check_request
from hgrn2.serve.results import Results
from hgrn2.serve.sampling import Features, SamplingRows, features_of, seed_of
from hgrn2.serve.sessions import Session, check_session, model_fingerprint
from hgrn2.serve.speculation import Speculation
from hgrn2.serve.tiles import TILE, TiledReader
from hgrn2.shapes import describe


class Engine:
    """Continue prompts of token ids; each call of `step` reads a share of the prompts and decodes one token of each.

    The rows of the pool are the states: the first ones of the continuations that run, without gaps, then those of the
    prompts that are read. A decode step changes the first rows in place.

    Not safe for several threads: one thread calls its methods.

    Args:
        model: the model; it is put into evaluation mode. Weights of joined projections become views of one tensor.
        options: options; None for the defaults.

    Attributes:
        prefixes: the prefix cache, or None.

    Raises:
        UserError: an option does not fit the model or the device.

    Example:
        >>> from hgrn2 import HGRN2LM, presets
        >>> from hgrn2.serve import Engine, Request, RequestSampling
        >>> engine = Engine(HGRN2LM(presets.tiny(vocab_size=257)))
        >>> found = engine.generate([Request([72, 105], 5, RequestSampling(seed=1))])
        >>> len(found[0].tokens)
        5
    """

    def __init__(self, model: HGRN2LM, options: EngineOptions | None = None):
        self.options = own = EngineOptions() if options is None else options
        if not isinstance(model, HGRN2LM):
            raise UserError(f"engine: model is {describe(model)}; wanted an hgrn2.HGRN2LM")
        if any(layer.attn.direction != "causal" for layer in model.model.layers):  # pyright: ignore
            raise UserError("engine: the model reads in both directions; wanted a causal one", "unsupported")
        self.device = model.lm_head.weight.device
        if own.deterministic and self.device.type != "cpu":
            raise UserError(
                f"engine: deterministic is true on {self.device}; it is available on the CPU", "unsupported"
            )
        self.fingerprint = model_fingerprint(model)
        if own.weights == "bfloat16":
            model = copy.deepcopy(model).to(torch.bfloat16)
        self.model = model.eval()
        self.vocab_size = model.config.vocab_size if own.vocab_size is None else own.vocab_size
        if self.vocab_size > model.config.vocab_size:
            raise UserError(
                f"engine: vocab_size is {self.vocab_size}, the model's {model.config.vocab_size}; wanted at most that",
                "mismatch",
            )
        self._max_batch = -(-own.max_batch // TILE) * TILE if own.deterministic else own.max_batch
        specs = model.state_spec()
        self.is_limited = any(spec.grows and spec.limit is None for layer in specs for spec in layer.values())
        self.pool = StatePool(specs, self._max_batch + own.max_readers, own.context_limit, self.device)
        self.rows = SamplingRows(self._max_batch, self.vocab_size, self.device)
        self._writes_late = own.write_every > 1
        ring = (self._max_batch, own.write_every) if self._writes_late else None
        self._step = DecodeStep(model, self.pool.grows, ring)
        self._tiles = TiledReader(self._step, self.pool) if own.deterministic else None
        self._drafts = None
        if own.speculate and self._tiles is not None:
            self._drafts = Speculation(self._tiles, self.rows, own.speculate)
        is_cuda = self.device.type == "cuda"
        has_graphs = is_cuda and own.cuda_graphs and not self._writes_late
        self._graphs = DecodeGraphs(self._step, self.pool, self.rows, self._max_batch) if has_graphs else None
        self.prefixes = None
        if own.prefix_bytes:
            self.prefixes = PrefixCache(own.prefix_bytes, cost(model.config).flops_per_token_forward)
        read = self._tiles or PackedPrefill(model, self.pool)
        readers = range(self._max_batch, self.pool.num_rows)
        self._prompts = PromptReader(self.pool, readers, read, own.prefill_tokens, self.prefixes)
        self._running: list[Running] = []
        self._results = Results(is_cuda)
        self._sessions: dict[tuple[int, int], Session] = {}
        self._numbers = itertools.count()
        self._ended: list[TokenEvent] = []

    def submit(self, request: Request, session: Session | None = None) -> int:
        """Queue a request.

        Args:
            request: the request.
            session: text that the request continues; None for a new one. With no tokens of its own and no seed, the
                request continues the random numbers of the session.

        Returns:
            The number of the request, which its events carry.

        Raises:
            UserError: the request is invalid or too long, or the session belongs to another model.
        """
        check_request(request).check(self.vocab_size, session is None)
        tokens, num_read, state = list(request.tokens), 0, None
        if session is not None:
            session = check_session(session, self.model, self.model.state_spec(), self.fingerprint)
            tokens = [*session.tokens, *tokens]
            num_read, state = session.num_read, session.state
        most = len(tokens) + request.max_tokens
        if self.is_limited and most > self.options.context_limit:
            raise UserError(
                f"request: {len(tokens)} tokens and max_tokens = {request.max_tokens} make {most}; the engine has room "
                f"for context_limit = {self.options.context_limit}, shorten the prompt or make it larger"
            )
        prompt = Prompt(next(self._numbers), request, tokens, num_read, state=state, session=session)
        self._prompts.add(prompt)
        return prompt.request_id

    def step(self) -> list[TokenEvent]:
        """Read a share of the prompts, decode one token of each running continuation, and return what was written."""
        events, self._ended = self._ended, []
        self._prompts.step()
        events += self._place()
        if self._running:
            if self._drafts is not None and self._drafts.can_run(self._running):
                events += self._speculate(self._drafts)
            else:
                self._decode()
        return events + self._collect(1 if self._running and self._runs_ahead() else 0)

    def generate(self, requests: Iterable[Request]) -> list[Continuation]:
        """Run requests to their ends.

        Args:
            requests: the requests.

        Returns:
            The continuations of all requests in order, n for each.
        """
        found: dict[tuple[int, int], Continuation] = {}
        for request in requests:
            number = self.submit(request)
            found |= {(number, i): Continuation(number, i) for i in range(request.n)}
        while self.is_busy:
            for event in self.step():
                key = (event.request_id, event.index)
                if key in found:
                    found[key].add(event)
        return list(found.values())

    def stream(self, request: Request, session: Session | None = None) -> Iterator[TokenEvent]:
        """Run one request and yield its tokens as they are written; other requests run on beside it.

        Closing the iterator cancels the request. Events of other requests are dropped: a program with several at once
        calls `step`.
        """
        number, left = self.submit(request, session), request.n
        try:
            while left:
                for event in self.step():
                    if event.request_id == number:
                        left -= event.finish_reason is not None
                        yield event
        finally:
            if left:
                self.cancel(number)

    @property
    def is_busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._prompts.num_waiting or self._running or self._results.num_pending or self._ended)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts read so far, without those whose state was reused."""
        return self._prompts.num_read

    @property
    def num_reused_tokens(self) -> int:
        """Tokens of prompts whose state came from the prefix cache."""
        return self._prompts.num_reused

    @property
    def num_drafted(self) -> int:
        """Tokens drafted so far."""
        return 0 if self._drafts is None else self._drafts.num_drafted

    @property
    def num_accepted(self) -> int:
        """Drafted tokens that were right."""
        return 0 if self._drafts is None else self._drafts.num_accepted

    @property
    def num_running(self) -> int:
        """Continuations that are decoded."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests whose prompts are not read to the end."""
        return self._prompts.num_waiting

    @property
    def num_free_rows(self) -> int:
        """Rows of the pool that hold no state of a request."""
        return self._max_batch - len(self._running) + self._prompts.num_free_rows

    def cancel(self, request_id: int, index: int | None = None) -> None:
        """End a request; its rows are free at once. Requests that have ended are left alone.

        Args:
            request_id: from `submit`.
            index: a continuation that runs; None for all of the request.
        """
        prompt = self._prompts.find(request_id)
        if prompt is not None and index is None:
            self._prompts.remove(prompt)
            rest = range(prompt.num_placed, prompt.request.n)
            self._ended += [TokenEvent(request_id, i, None, "cancelled") for i in rest]
        for running in list(self._running):
            if running.prompt.request_id == request_id and index in (None, running.index):
                self._end(running, "cancelled")
                self._ended.append(TokenEvent(*running.key, None, "cancelled"))

    def pause(self, request_id: int, index: int = 0) -> Session:
        """End a running continuation, and return the session from which it continues exactly.

        Args:
            request_id: from `submit`.
            index: the continuation, from 0.

        Raises:
            UserError: it is not running.
        """
        self._ended += self._collect(0)
        running = next((r for r in self._running if r.key == (request_id, index)), None)
        if running is None:
            raise UserError(f"pause: request {request_id}, continuation {index} is not running", "not-found")
        session = self._session_of(running)
        self._end(running, "cancelled")
        self._ended.append(TokenEvent(*running.key, None, "cancelled"))
        return session

    def session(self, request_id: int, index: int = 0) -> Session:
        """Return the session of a continuation that ended, once, for a request with keep = True.

        Raises:
            UserError: there is none.
        """
        session = self._sessions.pop((request_id, index), None)
        if session is None:
            raise UserError(
                f"session: request {request_id}, continuation {index} left none; give keep=True and take it once, "
                "after the end",
                "not-found",
            )
        return session

    def _place(self) -> list[TokenEvent]:
        """Give rows to continuations of prompts that are read, and draw their first tokens."""
        first, logits = len(self._running), []
        done = self._prompts.done
        if done:
            self._flush()
        while done and len(self._running) < self._max_batch:
            prompt = done[0]
            assert prompt.row is not None
            assert prompt.logits is not None
            index, row = prompt.num_placed, len(self._running)
            self.pool.copy(prompt.row, row)
            running = Running(prompt, index, list(prompt.tokens), len(prompt.tokens))
            self._set_sampling(running, row)
            self._running.append(running)
            logits.append(prompt.logits)
            prompt.num_placed += 1
            if prompt.num_placed == prompt.request.n:
                self._prompts.remove(prompt)
        if logits:
            batch = torch.stack(logits)
            placed = self._running[first:]
            drawn = self.rows.draw(batch, first, self._features(placed))
            self._results.push(placed, drawn, batch)
            # the first token may be the last
            return self._collect(0)
        return []

    def _set_sampling(self, running: Running, row: int) -> None:
        prompt, sampling = running.prompt, running.request.sampling
        session = prompt.session
        resumes = session is not None and not prompt.request.tokens and sampling.seed is None
        if resumes and session is not None and session.seed is not None and running.index == 0:
            running.seed, running.num_prompt = session.seed, session.num_prompt
        else:
            running.seed, running.num_prompt = seed_of(sampling, running.index), len(prompt.tokens)
        self.rows.set(row, sampling, running.seed, prompt.tokens[: running.num_prompt])
        self.rows.replay(row, prompt.tokens[running.num_prompt :])

    def _decode(self) -> None:
        count = len(self._running)
        features = self._features(self._running)
        if self._graphs is not None:
            logits = self._graphs.decode(count)
            drawn = self._graphs.draw(logits, features)
        else:
            if self._tiles is not None:
                logits = self._tiles.decode(self.rows.tokens, count)
            else:
                logits = self._step(self.rows.tokens[:count], self.pool.view(0, count))
            drawn = self.rows.draw(logits, 0, features)
        for running in self._running:
            running.num_read += 1
        self._results.push(list(self._running), drawn, logits)

    def _features(self, running: Sequence[Running]) -> Features:
        found = Features()
        for one in running:
            found = found.union(features_of(one.request.sampling, one.request.logprobs is not None))
        return found

    def _runs_ahead(self) -> bool:
        # a session needs the state before the token that ended it
        return self._results.is_async and self.options.run_ahead and not any(r.request.keep for r in self._running)

    def _collect(self, ahead: int) -> list[TokenEvent]:
        """Report the tokens of all steps but the last `ahead` ones."""
        events = []
        while self._results.num_pending > ahead:
            for running, event in self._results.pop():
                events.append(self._append(running, event))
        return events

    def _append(self, running: Running, event: TokenEvent) -> TokenEvent:
        request, token = running.request, event.token
        reason: FinishReason | None = None
        if token is None:
            reason = "not-finite"
        else:
            running.tokens.append(token)
            if token in request.stop_ids:
                reason = "stop"
            elif running.num_written >= request.max_tokens:
                reason = "length"
        if reason is None:
            return event
        self._end(running, reason)
        return TokenEvent(event.request_id, event.index, token, reason, event.logprob, event.top_logprobs, event.logits)

    def _end(self, running: Running, reason: FinishReason) -> None:
        """Free the row of a continuation; the last one moves there."""
        self._flush()
        running.finish_reason = reason
        row, last = self._running.index(running), len(self._running) - 1
        if reason in ("length", "stop"):
            if running.request.keep:
                self._sessions[running.key] = self._session_of(running)
            self._prompts.snapshot(row, running.tokens[: running.num_read])
        moved = self._running.pop()
        if row != last:
            self.pool.copy(last, row)
            self.rows.copy(last, row)
            self._running[row] = moved
        if self._drafts is not None:
            self._drafts.forget(running)

    def _flush(self) -> None:
        """Write states that decoding writes late, before rows are read or the batch changes."""
        if self._writes_late:
            self._step.flush(self.pool.view(0, len(self._running)))

    def _session_of(self, running: Running) -> Session:
        self._flush()
        row = self._running.index(running)
        state = self.pool.read([row], running.num_read)
        return Session(
            tuple(running.tokens), running.num_read, state, self.fingerprint, running.num_prompt, running.seed
        )

    def _speculate(self, drafts: Speculation) -> list[TokenEvent]:
        """Verify drafts of each running continuation, and keep the tokens that greedy decoding would have written."""
        events = []
        for running in list(self._running):
            for token, logits in drafts.run(running, self._running.index(running)):
                events.append(self._append(running, TokenEvent(*running.key, token, logits=logits)))
        return events
