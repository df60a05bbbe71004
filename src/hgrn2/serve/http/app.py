"""The application: paths, and errors in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from importlib import resources
from typing import TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from hgrn2.errors import UserError
from hgrn2.serve.http.errors import ApiError, api_error
from hgrn2.serve.http.gate import Gate
from hgrn2.serve.http.schema import ChatBody, CompletionBody, parse_body
from hgrn2.serve.http.server import Call, CompletionServer

T = TypeVar("T")
# the page holds its script and style, and sends requests to this server alone
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(server: CompletionServer) -> FastAPI:
    """Return the application of a server; its lifespan starts and ends the engine's thread.

    Args:
        server: the server.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.thread.start()
        try:
            yield
        finally:
            await asyncio.to_thread(server.thread.close)

    # its pages of documentation would load scripts from elsewhere
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_errors(app)
    _add_information(app, server)
    _add_completions(app, server)
    _add_sessions(app, server)
    options = server.options
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
        )  # fmt: skip
    app.add_middleware(
        Gate, options=options, is_draining=lambda: server.is_draining,
        count=lambda path, status: server.metrics.requests.labels(path, str(status)).inc(),
    )  # fmt: skip
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(UserError)
    async def refused_by_engine(_: Request, error: UserError) -> Response:
        found = api_error(error)
        return JSONResponse(found.body, found.status)

    @app.exception_handler(HTTPException)
    async def refused_by_router(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]}: {error.detail}"
        found = ApiError(error.status_code, message, "not-found" if error.status_code == 404 else None)
        return JSONResponse(found.body, found.status, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        # the text of the error may hold what is not the client's
        return JSONResponse(ApiError(500, f"the server failed ({type(error).__name__})", "failure").body, 500)


def _add_information(app: FastAPI, server: CompletionServer) -> None:
    engine, options = server.engine.engine, server.options
    about = {
        "id": options.name, "object": "model", "created": 0, "owned_by": "hgrn2",
        "vocab_size": engine.vocab_size, "max_tokens": options.max_tokens,
        "max_prompt_tokens": options.max_prompt_tokens, "state_bytes": engine.pool.bytes_of(0),
        "has_tokenizer": server.tokenizer is not None, "saves_sessions": options.session_folder is not None,
    }  # fmt: skip

    @app.get("/")
    async def page() -> Response:
        text = resources.files("hgrn2.serve.http").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    @app.get("/health")
    async def health() -> Response:
        if not server.thread.is_alive:
            return JSONResponse({"status": "failed"}, 503)
        if server.is_draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != options.name:
            raise ApiError(404, f"model {name[:100]!r} does not exist", "model_not_found", "model")
        return JSONResponse(about)


def _add_completions(app: FastAPI, server: CompletionServer) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse_body(CompletionBody, await request.body())
        return await _respond(server, request, await server.start_completion(body))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        body = parse_body(ChatBody, await request.body())
        return await _respond(server, request, await server.start_chat(body))

    @app.post("/v1/completions/{name}/pause")
    async def pause(name: str) -> Response:
        return JSONResponse({"id": name, "object": "sessions", "sessions": await server.pause(name)})


def _add_sessions(app: FastAPI, server: CompletionServer) -> None:
    store = server.sessions

    @app.get("/v1/sessions/{name}")
    async def session(name: str) -> Response:
        found = await asyncio.to_thread(store.get, name)
        about = {
            "id": name, "object": "session", "num_tokens": len(found.tokens), "bytes": found.state.num_bytes,
            "is_saved": store.is_saved(name),
        }  # fmt: skip
        return JSONResponse(about)

    @app.post("/v1/sessions/{name}/save")
    async def save(name: str) -> Response:
        size = await asyncio.to_thread(store.save, name)
        return JSONResponse({"id": name, "object": "session", "is_saved": True, "file_bytes": size})

    @app.delete("/v1/sessions/{name}")
    async def remove(name: str) -> Response:
        await asyncio.to_thread(store.remove, name)
        return JSONResponse({"id": name, "object": "session", "deleted": True})


async def _respond(server: CompletionServer, request: Request, call: Call) -> Response:
    """Return the answer of a call; the call ends when its client leaves."""
    headers = {"X-Request-Id": call.format.id}
    try:
        if not call.settings.stream:
            return JSONResponse(await _unless_client_leaves(request, server.answer(call)), headers=headers)
        chunks = server.chunks(call)
        first = await _unless_client_leaves(request, anext(chunks))
    except BaseException:
        server.end(call)
        raise

    async def body() -> AsyncIterator[bytes]:
        try:
            yield first
            async for chunk in chunks:
                yield chunk
        finally:
            server.end(call)

    return StreamingResponse(body(), headers=headers | {"Cache-Control": "no-store"}, media_type="text/event-stream")


async def _unless_client_leaves(request: Request, result: Awaitable[T]) -> T:
    """Wait for a result; cancel it if the client leaves.

    Raises:
        ApiError: the client left; no one receives this error.
    """

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, left = asyncio.ensure_future(result), asyncio.ensure_future(leave())
    try:
        await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client left", "cancelled")
        return work.result()
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)
