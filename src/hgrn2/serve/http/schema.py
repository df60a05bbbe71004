"""Bodies of requests, checked: types, ranges, unknown parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from hgrn2.serve.http.errors import ApiError
from hgrn2.serve.requests import MOST_LOGPROBS, Request, RequestSampling

# a stop text is looked for after every token
_MAX_STOPS, _MAX_STOP_CHARS = 16, 1024
_StopText = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
T = TypeVar("T", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool | None = None


class Settings(_Strict):
    """Parameters of both kinds of completions; those from top_k on are extensions.

    `user` and what follows up to `prompt_cache_key` are accepted and have no effect.
    """

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: _StopText | Annotated[list[_StopText], Field(max_length=_MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    session: str | None = None
    keep: bool | None = None
    return_token_ids: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end a continuation."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        """Tokens to write, at most; None for the default."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives whose log-probabilities are reported; None for no log-probabilities."""
        return None

    def request(self, max_tokens: int) -> Request:
        """Return the settings of the engine.

        Args:
            max_tokens: tokens to write, at most.

        Raises:
            UserError: a value is outside what the engine takes.
        """
        given = {
            "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty, "seed": self.seed,
        }  # fmt: skip
        bias = {_token_id(token): value for token, value in (self.logit_bias or {}).items()}
        sampling = RequestSampling(logit_bias=bias, **{k: v for k, v in given.items() if v is not None})
        return Request(
            (), max_tokens, sampling, self.n or 1, tuple(self.stop_token_ids or ()), self.num_logprobs,
            keep=bool(self.keep),
        )  # fmt: skip


class CompletionBody(Settings):
    """Body of /v1/completions.

    Parameters of OpenAI's that are not supported are accepted at the values that mean nothing.
    """

    prompt: Any = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives whose log-probabilities are reported; None for no log-probabilities."""
        return self.logprobs

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts, all texts or all lists of token ids.

        Raises:
            ApiError: the prompt is of another type.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(one, str) for one in prompt):
                return prompt
            lists: list[Any] = prompt if all(isinstance(one, list) for one in prompt) else [prompt]
            if all(type(token) is int for one in lists for token in one):
                return lists
        if prompt is None or prompt == []:
            return [""]
        raise ApiError(
            400, "prompt: wanted a text, a list of texts, a list of token ids, or a list of such lists",
            "invalid-value", "prompt",
        )  # fmt: skip


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a chat. Further fields, as a client copies them from an answer, must be empty."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """The text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(_Strict):
    """Format of the answer."""

    type: Literal["text"]


class ChatBody(Settings):
    """Body of /v1/chat/completions.

    Parameters of OpenAI's that are not supported are accepted at the values that mean nothing.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @field_validator("messages")
    @classmethod
    def _has_no_other_content(cls, messages: list[Message]) -> list[Message]:
        for message in messages:
            if found := [name for name, value in (message.model_extra or {}).items() if value]:
                raise ValueError(f"a message has {found[0]!r}, which is not supported")
        return messages

    @property
    def most_tokens(self) -> int | None:
        """Tokens to write, at most; None for the default."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives whose log-probabilities are reported; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse_body(kind: type[T], data: bytes) -> T:
    """Return the body of a request.

    Args:
        kind: the kind of body.
        data: JSON in UTF-8.

    Raises:
        ApiError: it is not JSON, or a parameter is unknown or has a value of the wrong type or range.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", "invalid-json") from None
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not JSON in UTF-8: {first['msg']}", "invalid-json")
    place = [str(part) for part in first["loc"]]
    param = place[0] if place else None
    if first["type"] == "extra_forbidden":
        message, code = f"{'.'.join(place)}: unknown or unsupported parameter; leave it out", "unknown-parameter"
    elif first["type"] == "none_required" or place == ["echo"]:
        message, code = f"{param}: not supported; leave it out", "unsupported"
    else:
        message, code = f"{'.'.join(place) or 'body'}: {first['msg']}", "invalid-value"
    raise ApiError(400, message, code, param)


def _token_id(text: str) -> int:
    # int() takes other scripts' digits, signs and underscores
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ApiError(400, f"logit_bias: {text[:40]!r} is not a token id", "invalid-value", "logit_bias")
    return int(text)
