"""Options of the server: names, limits and access."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from hgrn2.constraints import Ge, Gt, Le, check_fields


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server.

    Attributes:
        name: name of the model in the interface.
        host: address to listen on.
        port: port; 0 takes a free one.
        api_keys: keys, one of which each request must carry; empty for open access.
        max_waiting: continuations that may wait beside those that run; more are refused with status 429.
        max_body_bytes: bytes of the body of a request.
        max_prompt_tokens: tokens of one prompt.
        max_tokens: tokens that a request may ask for.
        max_choices: continuations of one request: prompts times n.
        max_seconds: time from the arrival of a request to its end; later it ends with what it has.
        body_seconds: time in which the body of a request must arrive.
        drain_seconds: time that running requests have after SIGTERM.
        max_connections: connections at once.
        cors_origins: origins of web pages that may use the server; "*" for all.
        session_bytes: bytes of sessions in memory; the oldest leave first.
        session_folder: folder of sessions on the disk; None refuses to write them.
    """

    name: str = "hgrn2"
    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    api_keys: tuple[str, ...] = ()
    max_waiting: Annotated[int, Ge(0)] = 256
    max_body_bytes: Annotated[int, Ge(1)] = 2**22
    max_prompt_tokens: Annotated[int, Ge(1)] = 131072
    max_tokens: Annotated[int, Ge(1)] = 4096
    max_choices: Annotated[int, Ge(1), Le(1024)] = 128
    max_seconds: Annotated[float, Gt(0)] = 600.0
    body_seconds: Annotated[float, Gt(0)] = 30.0
    drain_seconds: Annotated[float, Ge(0)] = 30.0
    max_connections: Annotated[int, Ge(1)] = 2048
    cors_origins: tuple[str, ...] = ()
    session_bytes: Annotated[int, Ge(0)] = 2**30
    session_folder: Path | None = None

    def __post_init__(self) -> None:
        check_fields(self, "server")

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach the server."""
        return self.host in LOOPBACK_HOSTS or self.host.startswith("127.")


LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
