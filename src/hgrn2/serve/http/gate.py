"""Checks before any handler: host, origin, key, and the size of the body."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

from hgrn2.serve.http.errors import ApiError
from hgrn2.serve.http.options import LOOPBACK_HOSTS, ServerOptions

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
# paths that need no key
_OPEN_PATHS = ("/", "/health")
# a body up to this many times the limit is received and discarded: a connection that is closed before could lose the
# answer
_DISCARDED = 4


class Gate:
    """ASGI middleware that refuses requests before they reach the application.

    A page of another origin can send requests to a server on the loopback address. So an origin that is neither the
    server's own nor allowed is refused, and so is a name that is not this machine's while only it is served.

    Args:
        app: the application.
        options: options of the server.
        count: called with the path and the status of every answer.
        is_draining: whether new work is refused.
    """

    def __init__(
        self, app: App, options: ServerOptions, count: Callable[[str, int], None], is_draining: Callable[[], bool]
    ):
        self.app, self.options, self.count, self.is_draining = app, options, count, is_draining
        self._keys = [key.encode() for key in options.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(_label(scope), message["status"])
            await send(message)

        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            self._check(scope, headers)
            body = await self._read(scope, headers, receive)
        except ApiError as error:
            # what is left of the body is not read
            response = JSONResponse(error.body, error.status, {**error.headers, "Connection": "close"})
            await response(scope, receive, counted)
            return
        if body is None:
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, replay, counted)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        own = headers.get(b"host", b"").decode("latin-1")
        host = _host_of(own)
        if self.options.is_loopback and not (host in LOOPBACK_HOSTS or host.startswith("127.")):
            raise ApiError(403, f"host {own[:100]!r} is not this machine; the server is open to it alone", "host")
        origin = headers.get(b"origin")
        if origin is not None and not self._allows(origin.decode("latin-1"), own):
            raise ApiError(403, "origin: pages of other origins may not use this server", "origin")
        if self._keys and scope["path"] not in _OPEN_PATHS and scope["method"] != "OPTIONS":
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            # all keys are compared, so that the time tells nothing
            found = [hmac.compare_digest(key.strip(), wanted) for wanted in self._keys]
            if kind.lower() != b"bearer" or not any(found):
                raise ApiError(
                    401, "no valid API key; send it as Authorization: Bearer KEY", "invalid-api-key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
        if scope["method"] == "POST" and self.is_draining():
            raise ApiError(503, "the server is ending; try another", "unavailable", headers={"Retry-After": "30"})

    def _allows(self, origin: str, own: str) -> bool:
        allowed = self.options.cors_origins
        return "*" in allowed or origin in allowed or urlsplit(origin).netloc == own

    async def _read(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Return the body; None if the client left."""
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return b""
        length, most = headers.get(b"content-length", b"0"), self.options.max_body_bytes
        if length.isdigit() and int(length[:20]) > _DISCARDED * most:
            raise _too_large(most)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.options.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    size += len(message.get("body", b""))
                    if size <= most:
                        parts.append(message.get("body", b""))
                    if size > _DISCARDED * most:
                        raise _too_large(most)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", "timeout") from None
        if size > most:
            raise _too_large(most)
        return b"".join(parts)


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes; send less", "body-too-large")


def _host_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _label(scope: Scope) -> str:
    """Return the path without names, so that there are few labels."""
    route = scope.get("route")
    return getattr(route, "path", None) or "other"
