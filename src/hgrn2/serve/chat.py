"""Chats as token ids: by the tokenizer's chat template, or in a plain form."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hgrn2.data.tokenizer import HFTokenizer, Tokenizer
from hgrn2.errors import MissingPackage, UserError
from hgrn2.extras import install_command

# in a text of a message, separates the characters of a special token, which it would be otherwise
_MARKS = ("\ue000", "\uf8ff", "\U000f0000", "\U0010fffd")
_PLAIN_NAMES = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
# a template that does not end must not fill the memory
_MAX_CHARS = 2**24


class ChatFormat:
    r"""Turns messages into the prompt after which the model answers.

    With a chat template among the tokenizer's files, it is the template's. The names of special tokens that it writes
    become these tokens; the same names in the texts of messages stay plain text, so that a message cannot end itself.

    Without a template, each message is a paragraph "User: ..." or "Assistant: ...", and an answer ends at the next
    "User:"; a system message stands alone at the start.

    Args:
        tokenizer: the tokenizer.

    Attributes:
        has_template: whether there is a template.
        stop: texts that end an answer.

    Raises:
        UserError: the template cannot be read.
        MissingPackage: there is a template, and jinja2 is not installed.

    Example:
        >>> from hgrn2.data import ByteTokenizer
        >>> ids = ChatFormat(ByteTokenizer()).encode([{"role": "user", "content": "Hi"}])
        >>> ByteTokenizer().decode(ids)
        'User: Hi\n\nAssistant:'
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        source, self._names = _template_of(tokenizer.companions)
        self._template = None if source is None else _compile(source)
        self.has_template = self._template is not None
        self.stop = () if self.has_template else ("\nUser:",)
        self._special: dict[str, int] = {}
        if isinstance(tokenizer, HFTokenizer):
            added = tokenizer.backend.get_added_tokens_decoder()
            self._special = {token.content: i for i, token in added.items() if token.special}

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a chat, up to where the answer begins.

        Args:
            messages: each with "role" ("system", "developer", "user" or "assistant") and "content".

        Raises:
            UserError: the template refuses the messages.
        """
        if self._template is None:
            return [*self.tokenizer.start_ids, *self.tokenizer.encode(_plain(messages))]
        mark = self._unused_mark(messages)
        hidden = [{**message, "content": self._hide(message["content"], mark)} for message in messages]
        return self._encode(self._render(hidden), mark)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a chat as the template or the plain form writes it.

        Args:
            messages: as in `encode`.

        Raises:
            UserError: the template refuses the messages.
        """
        return _plain(messages) if self._template is None else self._render(messages)

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        assert self._template is not None
        pieces, size = [], 0
        try:
            for piece in self._template.generate(messages=messages, add_generation_prompt=True, **self._names):
                size += len(piece)
                if size > _MAX_CHARS:
                    raise UserError(f"messages: the chat template writes more than {_MAX_CHARS:,} characters")
                pieces.append(piece)
        except UserError:
            raise
        except Exception as error:  # templates call anything
            raise UserError(f"messages: the chat template refuses them ({error})") from None
        return "".join(pieces)

    def _unused_mark(self, messages: Sequence[Mapping[str, str]]) -> str:
        found = next((m for m in _MARKS if not any(m in message["content"] for message in messages)), None)
        if found is None:
            raise UserError("messages: they hold all of U+E000, U+F8FF, U+F0000 and U+10FFFD; leave one out")
        return found

    def _hide(self, text: str, mark: str) -> str:
        for token in self._special:
            if token in text:
                # a token within another is hidden with it
                text = text.replace(token, mark.join(token) if len(token) > 1 else mark + token)
        return text

    def _encode(self, text: str, mark: str) -> list[int]:
        if not self._special:
            return self.tokenizer.encode(text.replace(mark, ""))
        # the longest first, for tokens that begin alike
        names = sorted(self._special, key=len, reverse=True)
        # a token of one character is hidden by the mark before it
        pattern = f"(?<!{mark})({'|'.join(map(re.escape, names))})"
        ids: list[int] = []
        for i, part in enumerate(re.split(pattern, text)):
            if i % 2:
                ids.append(self._special[part])
            elif part:
                ids += self.tokenizer.encode(part.replace(mark, ""))
        return ids


def _plain(messages: Sequence[Mapping[str, str]]) -> str:
    found = [
        message["content"] if i == 0 and _PLAIN_NAMES[message["role"]] == "System" else
        f"{_PLAIN_NAMES[message['role']]}: {message['content']}"
        for i, message in enumerate(messages)
    ]  # fmt: skip
    return "\n\n".join([*found, "Assistant:"])


def _template_of(companions: Mapping[str, bytes]) -> tuple[str | None, dict[str, Any]]:
    """Return the chat template among a tokenizer's files, and the special tokens that it may name."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            found = json.loads(companions.get(name, b"{}"))
        except ValueError:
            continue
        settings |= found if isinstance(found, dict) else {}
    tokens = {}
    for name, value in settings.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            tokens[name] = value
    template = settings.get("chat_template")
    if "chat_template.jinja" in companions:
        template = companions["chat_template.jinja"].decode("utf-8", "replace")
    if isinstance(template, list):
        # several by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None, tokens


def _compile(source: str) -> Any:
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingPackage(f"chat templates need jinja2: {install_command('serve')}") from error

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        # the filter of jinja2 escapes for HTML
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"chat template: {error}; correct it in the folder of the tokenizer", "unreadable") from None
