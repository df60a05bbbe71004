"""`hgrn2 chat`: talk with a trained model in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import tyro

from hgrn2.cli.command import Command
from hgrn2.cli.output import tell
from hgrn2.errors import UserError, visible
from hgrn2.loading import load

_HELP = "/new begins again, /back takes the last exchange back, /quit or Ctrl-D ends; Ctrl-C ends an answer"


def chat(
    run: tyro.conf.Positional[Path],
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    checkpoint: Literal["latest", "best"] = "latest",
    device: str = "auto",
) -> None:
    r"""Talk with a trained model in the terminal.

    Messages go through the tokenizer's chat template, or without one as "User: ..." and "Assistant: ...". On a
    terminal, control characters that a model writes are shown as replacement characters. /help lists the commands.

    Args:
        run: A run folder, a checkpoint, or a folder of another layout (see convert) with its tokenizer.json.
        system: A system message.
        max_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens that together reach this probability.
        min_p: Keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: Above 1, tokens that were already there become less likely.
        seed: The same seed gives the same answers.
        checkpoint: Which checkpoint of a run.
        device: cpu, cuda or auto.
    """
    from hgrn2.serve import Engine, EngineOptions, Request, RequestSampling
    from hgrn2.serve.chat import ChatFormat
    from hgrn2.serve.text import TextEngine

    sampling = RequestSampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
    request = Request((), max_tokens, sampling)
    _check_text("--system", system or "")
    model, tokenizer = load(run, checkpoint, device)
    # the prefix cache keeps the state after each answer, so that only the next message is read
    options = EngineOptions(1, 1, prefix_bytes=2**28, vocab_size=tokenizer.vocab_size)
    engine, form = TextEngine(Engine(model, options), tokenizer), ChatFormat(tokenizer)
    start = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    is_terminal = sys.stdout.isatty()
    shown = visible if is_terminal else str
    if is_terminal:
        tell(_HELP)
    while (line := _read_line("> " if is_terminal else "")) is not None:
        text = line.strip()
        if text == "/quit":
            break
        if text == "/new":
            messages = list(start)
        elif text == "/back":
            messages = messages[:-2] if len(messages) > len(start) else messages
        elif text.startswith("/"):
            tell(_HELP)
        elif text:
            messages.append({"role": "user", "content": text})
            answer = _answer(engine, form.encode(messages), request, form.stop, shown)
            messages.append({"role": "assistant", "content": answer.strip()})


def _answer(engine, tokens, request, stop, shown) -> str:
    """Print an answer as it is written, and return it; Ctrl-C ends it."""
    pieces = []
    stream = engine.stream(tokens, request, stop)
    try:
        for piece in stream:
            # the plain form writes a space before the answer
            piece = piece if pieces else piece.lstrip(" ")
            if piece:
                pieces.append(piece)
                print(shown(piece), end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
    print(flush=True)
    return "".join(pieces)


def _read_line(prompt: str) -> str | None:
    """Return the next line; None at the end or after Ctrl-C."""
    if prompt:
        print(prompt, end="", flush=True)
    try:
        line = sys.stdin.readline() if sys.stdin is not None else ""
        _check_text("the message", line)
    except KeyboardInterrupt:
        print()
        return None
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8; give text", "unreadable") from None
    return line or None


def _check_text(what: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8; give text") from None


COMMAND = Command("chat", chat, order=21, aliases=("talk", "repl"))
