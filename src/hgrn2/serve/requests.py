"""Requests to the engine, what it reports about them, and the records it keeps while they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from torch import Tensor

from hgrn2.constraints import Ge, Gt, Le, Lt, check_fields
from hgrn2.errors import UserError
from hgrn2.models.state import ModelState
from hgrn2.serve.sessions import Session
from hgrn2.shapes import describe

FinishReason = Literal["length", "stop", "cancelled", "not-finite"]
# alternatives reported per token, at most
MOST_LOGPROBS = 20


@dataclass(frozen=True)
class RequestSampling:
    """How the tokens of a request are sampled. The penalties and the bias apply first, then the rest in order.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep this many of the likeliest; 0 keeps all.
        top_p: keep the fewest tokens that together reach this probability (arXiv 1904.09751); 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest (arXiv 2407.01082); 0 keeps all.
        repetition_penalty: above 1, makes tokens of the prompt and the output less likely (arXiv 1909.05858).
        presence_penalty: subtracted from the logits of tokens that the output already has.
        frequency_penalty: subtracted once for each time that the output has the token.
        logit_bias: added to the logits of some tokens.
        seed: seed of the random numbers, which do not depend on other requests; None for a random one.
    """

    temperature: Annotated[float, Ge(0)] = 1.0
    top_k: Annotated[int, Ge(0)] = 0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    min_p: Annotated[float, Ge(0), Le(1)] = 0.0
    repetition_penalty: Annotated[float, Ge(0.01), Le(100)] = 1.0
    presence_penalty: Annotated[float, Ge(-100), Le(100)] = 0.0
    frequency_penalty: Annotated[float, Ge(-100), Le(100)] = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: Annotated[int | None, Ge(-(2**63)), Lt(2**64)] = None

    def __post_init__(self) -> None:
        check_fields(self, "sampling")

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens before, other than through the model."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        tokens: ids of the prompt; with a session, ids that follow what the session has read, which may be none.
        max_tokens: most tokens to write.
        sampling: how they are sampled.
        n: number of continuations; the prompt is read once. The first equals that of a request with n = 1.
        stop_ids: ids that end a continuation; the id is reported.
        logprobs: alternatives whose log-probabilities are reported for each token, 0 for the token's alone; None for
            no log-probabilities.
        return_logits: report the model's logits of each token.
        snapshot_at: numbers of tokens of the prompt after which the prefix cache keeps the state, such as the end of
            a prompt that many requests share.
        keep: whether a session can be taken after the end (`Engine.session`).
    """

    tokens: Sequence[int]
    max_tokens: Annotated[int, Ge(1)] = 256
    sampling: RequestSampling = field(default_factory=RequestSampling)
    n: Annotated[int, Ge(1), Le(1024)] = 1
    stop_ids: Sequence[int] = ()
    logprobs: Annotated[int | None, Ge(0), Le(MOST_LOGPROBS)] = None
    return_logits: bool = False
    snapshot_at: Sequence[int] = ()
    keep: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "request")

    def check(self, vocab_size: int, needs_tokens: bool) -> None:
        """Check the ids against a vocabulary.

        Args:
            vocab_size: number of ids.
            needs_tokens: whether the prompt must have a token.

        Raises:
            UserError: an id is outside the vocabulary, or the prompt is empty.
        """
        if needs_tokens and not len(self.tokens):
            raise UserError("request: tokens is empty; give at least one, such as the token that ends a text")
        for name, ids in (
            ("tokens", self.tokens),
            ("stop_ids", self.stop_ids),
            ("logit_bias", self.sampling.logit_bias),
        ):
            for token in ids:
                if type(token) is not int or not 0 <= token < vocab_size:
                    raise UserError(
                        f"request: {name} has {describe(token)}; the vocabulary has ids from 0 to {vocab_size - 1}"
                    )
        for token, bias in self.sampling.logit_bias.items():
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) < float("inf"):
                raise UserError(f"request: logit_bias of {token} is {describe(bias)}; wanted a finite number")
        for place in self.snapshot_at:
            if type(place) is not int or not 0 < place <= len(self.tokens):
                raise UserError(f"request: snapshot_at has {describe(place)}; the prompt has {len(self.tokens)} tokens")


@dataclass(frozen=True)
class TokenEvent:
    """One token of a continuation.

    Attributes:
        request_id: from `Engine.submit`.
        index: the continuation, from 0.
        token: id of the token; None if the continuation ended without one.
        finish_reason: why the continuation ends here; None if it does not.
        logprob: log-probability of the token under the model, before temperature, penalties and filters.
        top_logprobs: the likeliest tokens with their log-probabilities.
        logits: [vocab] on the CPU in float32 or wider, if wanted.
    """

    request_id: int
    index: int
    token: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    logits: Tensor | None = None


@dataclass
class Continuation:
    """All tokens of one continuation of a request.

    Attributes:
        request_id: from `Engine.submit`.
        index: the continuation, from 0.
        tokens: ids, without the prompt.
        finish_reason: why it ended; None while it runs.
        logprobs: log-probability of each token, if wanted.
        top_logprobs: alternatives of each token, if wanted.
        logits: logits of each token, if wanted.
    """

    request_id: int
    index: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    def add(self, event: TokenEvent) -> None:
        """Append the token of an event."""
        self.finish_reason = event.finish_reason
        if event.token is None:
            return
        self.tokens.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)
            self.top_logprobs.append(event.top_logprobs)
        if event.logits is not None:
            self.logits.append(event.logits)


@dataclass(eq=False)
class Prompt:
    """A request while its prompt is read.

    Attributes:
        request_id: its number.
        request: the request.
        tokens: all tokens from the start of the text, those of a session included.
        num_read: how many of them the state has read.
        row: row of the pool, or None while it waits.
        state: state to begin with, of a session; None for a fresh one.
        logits: [vocab] after the last token, once it is read.
        stops: numbers of tokens after which the prefix cache takes a snapshot, ascending.
        num_placed: continuations that have begun.
        session: the session that it continues.
    """

    request_id: int
    request: Request
    tokens: list[int]
    num_read: int = 0
    row: int | None = None
    state: ModelState | None = None
    logits: Tensor | None = None
    stops: list[int] = field(default_factory=list)
    num_placed: int = 0
    session: Session | None = None

    @property
    def num_left(self) -> int:
        """Tokens still to read."""
        return len(self.tokens) - self.num_read


@dataclass(eq=False)
class Running:
    """A continuation while it is decoded.

    Attributes:
        prompt: its prompt.
        index: the continuation, from 0.
        tokens: all tokens from the start of the text, with those written.
        num_read: tokens that the state in its row has read.
        seed: seed of its random numbers, in 64 bits.
        num_prompt: tokens before those that were drawn with this seed.
        finish_reason: why it ended; None while it runs.
    """

    prompt: Prompt
    index: int
    tokens: list[int]
    num_read: int
    seed: int = 0
    num_prompt: int = 0
    finish_reason: FinishReason | None = None

    @property
    def request(self) -> Request:
        """The request."""
        return self.prompt.request

    @property
    def num_written(self) -> int:
        """Tokens written so far."""
        return len(self.tokens) - len(self.prompt.tokens)

    @property
    def key(self) -> tuple[int, int]:
        """Number of the request and of the continuation."""
        return self.prompt.request_id, self.index


def check_request(request: Any) -> Request:
    """Return the request, or raise a UserError if it is none."""
    if not isinstance(request, Request):
        raise UserError(f"request is {describe(request)}; wanted an hgrn2.serve.Request")
    return request
