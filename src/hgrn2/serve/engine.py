"""The engine: many requests at once, each with a state of constant size."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.models import HGRN2LM
from hgrn2.models.cost import cost
from hgrn2.serve.decoding import DecodeStep
from hgrn2.serve.graphs import DecodeGraphs
from hgrn2.serve.lookup import Lookup
from hgrn2.serve.options import EngineOptions
from hgrn2.serve.pool import StatePool
from hgrn2.serve.prefill import PackedPrefill
from hgrn2.serve.prefix_cache import PrefixCache
from hgrn2.serve.requests import Continuation, FinishReason, Prompt, Request, Running, TokenEvent, check_request
from hgrn2.serve.results import Results
from hgrn2.serve.sampling import Features, SamplingRows, features_of, seed_of
from hgrn2.serve.scheduler import Scheduler
from hgrn2.serve.sessions import Session, check_session, model_fingerprint
from hgrn2.serve.tiles import TILE, TiledReader
from hgrn2.shapes import describe

# running requests up to which drafts are verified, one request at a time
_FEW = 4


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
        num_prompt_tokens: tokens of prompts read so far, without those whose state was reused.
        num_reused_tokens: tokens of prompts whose state came from the prefix cache.
        num_drafted: tokens drafted so far.
        num_accepted: drafted tokens that were right.

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
        tile = TILE if own.deterministic else 1
        self._max_batch = -(-own.max_batch // tile) * tile
        specs = model.state_spec()
        self.is_limited = any(spec.grows and spec.limit is None for layer in specs for spec in layer.values())
        capacity = own.context_limit
        self.pool = StatePool(specs, self._max_batch + own.max_readers, capacity, self.device)
        self.rows = SamplingRows(self._max_batch, self.vocab_size, self.device)
        self._writes_late = own.write_every > 1
        ring = (self._max_batch, own.write_every) if self._writes_late else None
        self._step = DecodeStep(model, self.pool.grows, ring)
        self._tiles = TiledReader(self._step, self.pool) if own.deterministic else None
        if own.speculate and self._tiles is not None and not self._tiles.reads_sequences:
            raise UserError("engine: speculate needs a model of HGRN2 layers without convolutions", "unsupported")
        self._read = self._tiles or PackedPrefill(model, self.pool)
        is_cuda = self.device.type == "cuda"
        self._graphs = None
        if is_cuda and own.cuda_graphs and not self._writes_late:
            self._graphs = DecodeGraphs(self._step, self.pool, self.rows, self._max_batch)
        self.prefixes = None
        if own.prefix_bytes:
            self.prefixes = PrefixCache(own.prefix_bytes, cost(model.config).flops_per_token_forward)
        self.num_prompt_tokens = self.num_reused_tokens = self.num_drafted = self.num_accepted = 0
        self._scheduler = Scheduler(own.prefill_tokens)
        self._free_readers = list(range(self._max_batch, self.pool.num_rows))
        self._read_prompts: deque[Prompt] = deque()
        self._running: list[Running] = []
        self._results = Results(is_cuda)
        self._sessions: dict[tuple[int, int], Session] = {}
        self._lookups: dict[tuple[int, int], Lookup] = {}
        self._numbers = itertools.count()
        self._ended: list[TokenEvent] = []

    def submit(self, request: Request, session: Session | None = None) -> int:
        """Queue a request.

        Args:
            request: the request.
            session: text that the request continues; None for a new one. With no tokens of its own and no seed, the
                request goes on drawing where the session paused.

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
        self._scheduler.waiting.append(prompt)
        return prompt.request_id

    def step(self) -> list[TokenEvent]:
        """Read a share of the prompts, decode one token of each running continuation, and return what was written."""
        events, self._ended = self._ended, []
        self._admit()
        self._read_share()
        events += self._place()
        if self._running:
            if self._can_speculate():
                events += self._speculate()
            else:
                self._decode()
        ahead = 1 if self._running and self._runs_ahead() else 0
        events += self._collect(ahead)
        return events

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
        waiting = self._scheduler.waiting or self._scheduler.reading or self._read_prompts
        return bool(waiting or self._running or self._results.num_pending or self._ended)

    @property
    def num_running(self) -> int:
        """Continuations that are decoded."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests whose prompts are not read to the end."""
        return len(self._scheduler.waiting) + len(self._scheduler.reading) + len(self._read_prompts)

    @property
    def num_free_rows(self) -> int:
        """Rows of the pool that hold no state of a request."""
        return self._max_batch - len(self._running) + len(self._free_readers)

    def cancel(self, request_id: int, index: int | None = None) -> None:
        """End a request; its rows are free at once. Requests that have ended are left alone.

        Args:
            request_id: from `submit`.
            index: a continuation that runs; None for all of the request.
        """
        for prompt in [*self._scheduler.waiting, *self._scheduler.reading, *self._read_prompts]:
            if prompt.request_id == request_id and index is None:
                self._forget(prompt)
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

    def _admit(self) -> None:
        waiting = self._scheduler.waiting
        while waiting and self._free_readers:
            prompt = waiting.popleft()
            prompt.row = self._free_readers.pop()
            self._begin(prompt)
            (self._read_prompts if prompt.logits is not None else self._scheduler.reading).append(prompt)

    def _begin(self, prompt: Prompt) -> None:
        """Set the row of a prompt to the state that it begins with, and choose where snapshots are taken."""
        assert prompt.row is not None
        tokens, cache = prompt.tokens, self.prefixes
        shared = 0
        if cache is not None:
            found = cache.find(tokens)
            if found is not None and found.num_tokens > prompt.num_read:
                self.num_reused_tokens += found.num_tokens - prompt.num_read
                prompt.num_reused = found.num_tokens - prompt.num_read
                prompt.state, prompt.num_read = found.state, found.num_tokens
                if not prompt.num_left:
                    prompt.logits = found.logits
            shared = cache.branch(tokens)
            before = len(tokens) - len(prompt.request.tokens)
            places = {before + place for place in prompt.request.snapshot_at} | {shared, len(tokens)}
            prompt.stops = sorted(place for place in places if prompt.num_read < place)
        if prompt.state is None:
            self.pool.clear(prompt.row)
        else:
            self.pool.write([prompt.row], prompt.state)
            prompt.state = None

    def _read_share(self) -> None:
        plan = self._scheduler.plan()
        if not plan:
            return
        parts = []
        for prompt, count in plan:
            assert prompt.row is not None
            parts.append((prompt.row, prompt.num_read, prompt.tokens[prompt.num_read : prompt.num_read + count]))
        logits = self._read(parts)
        for (prompt, count), own in zip(plan, logits, strict=True):
            prompt.num_read += count
            self.num_prompt_tokens += count
            assert prompt.row is not None
            if not prompt.num_left:
                prompt.logits = own.clone()
            if self.prefixes is not None and prompt.num_read in prompt.stops:
                self._snapshot(prompt.row, prompt.tokens[: prompt.num_read], prompt.logits)
            if not prompt.num_left:
                self._scheduler.reading.remove(prompt)
                self._read_prompts.append(prompt)

    def _snapshot(self, row: int, tokens: Sequence[int], logits: Tensor | None = None) -> None:
        assert self.prefixes is not None
        if not self.prefixes.has(tokens) and self.pool.bytes_of(len(tokens)) <= self.prefixes.budget_bytes:
            self.prefixes.add(tokens, self.pool.read([row], len(tokens)), logits)

    def _place(self) -> list[TokenEvent]:
        """Give rows to continuations of prompts that are read, and draw their first tokens."""
        first, logits = len(self._running), []
        if self._read_prompts:
            self._flush()
        while self._read_prompts and len(self._running) < self._max_batch:
            prompt = self._read_prompts[0]
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
                self._read_prompts.popleft()
                self._free_readers.append(prompt.row)
                prompt.row = None
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
            if self.prefixes is not None:
                self._snapshot(row, running.tokens[: running.num_read])
        moved = self._running.pop()
        if row != last:
            self.pool.copy(last, row)
            self.rows.copy(last, row)
            self._running[row] = moved
        self._lookups.pop(running.key, None)

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

    def _forget(self, prompt: Prompt) -> None:
        for queue in (self._scheduler.waiting, self._scheduler.reading, self._read_prompts):
            if prompt in queue:
                queue.remove(prompt)
        if prompt.row is not None:
            self._free_readers.append(prompt.row)
            prompt.row = None

    def _can_speculate(self) -> bool:
        if not self.options.speculate or len(self._running) > _FEW:
            return False
        wanted = [features_of(r.request.sampling, r.request.logprobs is not None) for r in self._running]
        return not any(any(features) for features in wanted)

    def _speculate(self) -> list[TokenEvent]:
        """Verify drafts of each running continuation, and keep the tokens that greedy decoding would have written."""
        events = []
        for running in list(self._running):
            row = self._running.index(running)
            lookup = self._lookups.get(running.key)
            if lookup is None:
                lookup = self._lookups[running.key] = Lookup(running.tokens)
            most = min(self.options.speculate, running.request.max_tokens - running.num_written - 1, TILE - 1)
            tokens = [running.tokens[-1], *lookup.draft(most)]
            assert self._tiles is not None
            logits, ring = self._tiles.verify(row, tokens)
            best = logits.max(-1)
            finite = best.values.isfinite().tolist()
            found = [token if ok else None for token, ok in zip(best.indices.tolist(), finite, strict=True)]
            right = 0
            while right < len(tokens) - 1 and found[right] == tokens[right + 1]:
                right += 1
            self.num_drafted += len(tokens) - 1
            # a stop token ends the text before the drafts that follow it
            stop = next((i for i in range(right + 1) if found[i] in running.request.stop_ids), right)
            self.num_accepted += stop
            self._tiles.commit(row, ring, stop + 1)
            running.num_read += stop + 1
            self.rows.tokens[row] = found[stop] or 0
            self.rows.number[row] += stop + 1
            kept = found[: stop + 1]
            lookup.extend([token for token in kept if token is not None])
            for i, token in enumerate(kept):
                row_logits = logits[i].clone() if running.request.return_logits else None
                events.append(self._append(running, TokenEvent(*running.key, token, logits=row_logits)))
        return events
