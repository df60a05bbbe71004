"""`hgrn2 serve`: an OpenAI-compatible server of a trained model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from hgrn2.cli.command import Command
from hgrn2.cli.output import tell
from hgrn2.cli.parsing import Texts
from hgrn2.errors import MissingPackage, UserError
from hgrn2.extras import install_command
from hgrn2.loading import load, load_weights

if TYPE_CHECKING:
    from hgrn2.data.tokenizer import Tokenizer
    from hgrn2.models import HGRN2LM

_KEY_VARIABLE = "HGRN2_API_KEY"


def serve(
    run: tyro.conf.Positional[Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key_file: Path | None = None,
    max_batch: int = 32,
    max_waiting: int = 256,
    max_tokens: int = 4096,
    max_prompt_tokens: int = 131072,
    max_body_mib: int = 4,
    max_seconds: float = 600.0,
    drain_seconds: float = 30.0,
    context_limit: int = 4096,
    prefix_mib: int = 256,
    session_mib: int = 1024,
    sessions: Path | None = None,
    cors_origins: Texts = (),
    weights: Literal["as-is", "bfloat16"] = "as-is",
    deterministic: bool = False,
    checkpoint: Literal["latest", "best"] = "latest",
    device: str = "auto",
) -> None:
    """Serve a trained model with OpenAI's interface.

    Needs the extra "serve". With the environment variable HGRN2_API_KEY or a file of keys, requests must carry a key.
    A model without a tokenizer takes and returns token ids.

    Args:
        run: A run folder, a checkpoint, or a folder of another layout (see convert).
        host: Address to listen on; 0.0.0.0 opens the server to other machines.
        port: Port to listen on; 0 takes a free one.
        name: Name of the model in requests; by default that of its folder.
        api_key_file: File of API keys, one a line.
        max_batch: Continuations decoded at once.
        max_waiting: Continuations that wait at most; further requests get status 429.
        max_tokens: Most tokens that a request may ask for.
        max_prompt_tokens: Most tokens of a prompt.
        max_body_mib: Most MiB of the body of a request.
        max_seconds: Time of a request; later it ends with what it has.
        drain_seconds: Time that running requests have after SIGTERM.
        context_limit: Tokens of a text in a model with full attention.
        prefix_mib: MiB for states after prompts, which later prompts may begin with.
        session_mib: MiB for sessions that clients keep.
        sessions: Folder in which clients may save sessions.
        cors_origins: Origins of web pages that may use the server, such as https://example.org.
        weights: "bfloat16" computes with a copy of the model in bfloat16.
        deterministic: The same bits whatever else runs; on the CPU.
        checkpoint: Which checkpoint of a run.
        device: cpu, cuda or auto.
    """
    try:
        from hgrn2.serve.http.options import ServerOptions
        from hgrn2.serve.http.run import serve as run_server
    except ImportError as error:
        raise MissingPackage(f"hgrn2 serve needs {error.name}: {install_command('serve')}") from error
    from hgrn2.serve import Engine, EngineOptions
    from hgrn2.serve.text import TextEngine

    options = ServerOptions(
        name=name or run.resolve().name, host=host, port=port, api_keys=_keys(api_key_file), max_waiting=max_waiting,
        max_body_bytes=max_body_mib * 2**20, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens,
        max_seconds=max_seconds, drain_seconds=drain_seconds, cors_origins=cors_origins,
        session_bytes=session_mib * 2**20, session_folder=sessions,
    )  # fmt: skip
    model, tokenizer = open_model(run, checkpoint, device)
    engine_options = EngineOptions(
        max_batch, context_limit=context_limit, prefix_bytes=prefix_mib * 2**20, weights=weights,
        vocab_size=None if tokenizer is None else tokenizer.vocab_size, deterministic=deterministic,
    )  # fmt: skip
    if not options.is_loopback and not options.api_keys:
        tell(f"warning: {host} is open to other machines without a key; set {_KEY_VARIABLE} or --api-key-file")
    engine = TextEngine(Engine(model, engine_options), tokenizer)
    run_server(engine, options, lambda url: tell(f"serving {options.name} at {url} (Ctrl-C ends)"))


def open_model(
    run: Path, checkpoint: Literal["latest", "best"] = "latest", device: str = "auto"
) -> tuple[HGRN2LM, Tokenizer | None]:
    """Return a model and its tokenizer, or None if the folder has none.

    Raises:
        UserError: there is no model, or a file is damaged.
    """
    try:
        model, tokenizer = load(run, checkpoint, device)
    except UserError as error:
        if error.code not in ("not-found", "unsupported"):
            raise
        # fails again unless only the tokenizer is missing
        model = load_weights(run, checkpoint, device)
        tell("no tokenizer: prompts and answers are token ids")
        return model, None
    return model, tokenizer


def _keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file and of the environment.

    Raises:
        UserError: the file cannot be read or holds no key.
    """
    keys = [os.environ.get(_KEY_VARIABLE, "").strip()]
    if path is not None:
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no readable keys ({error}); name a text file", "unreadable") from None
        if not any(lines):
            raise UserError(f"{path}: holds no key; write one a line", "incomplete")
        keys += lines
    return tuple(key for key in keys if key)


COMMAND = Command(
    "serve", serve, order=22, common=("run", "host", "port", "api_key_file", "max_batch", "sessions", "device"),
    aliases=("server", "api", "openai"),
)  # fmt: skip
