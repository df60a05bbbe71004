"""`hgrn2 generate`: write text with a trained model."""

from __future__ import annotations

import os
import select
import stat
import sys
from pathlib import Path
from typing import Literal

import tyro

from hgrn2.cli.command import Command
from hgrn2.cli.output import tell
from hgrn2.cli.parsing import Texts
from hgrn2.errors import UserError, visible
from hgrn2.loading import load
from hgrn2.storage.staging import check_writable_file


def generate(
    run: tyro.conf.Positional[Path],
    prompt: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Texts = (),
    state_in: Path | None = None,
    state_out: Path | None = None,
    checkpoint: Literal["latest", "best"] = "latest",
    device: str = "auto",
) -> None:
    r"""Write text with a trained model.

    On a terminal, control characters that a model writes are shown as \ufffd; a pipe or file gets them as they are.

    Args:
        run: A run folder, a checkpoint, or a folder of another layout (see convert) with its tokenizer.json.
        prompt: Text to continue; without it, what is piped into standard input.
        max_tokens: Most tokens to write.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens that together reach this probability.
        min_p: Keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: Above 1, tokens that were already there become less likely.
        seed: The same seed writes the same text.
        stop: Texts that end the writing; \n means a line end.
        state_in: Continue from a state file.
        state_out: Write the state to a file, to continue later; loading it is as fast for a long text.
        checkpoint: Which checkpoint of a run.
        device: cpu, cuda or auto.
    """
    from hgrn2.inference.writing import Sampling, Writer, space_warning
    from hgrn2.serve.reading import fast_reader

    if max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}; wanted at least 1")
    try:
        "".join([prompt or "", *stop]).encode()
    except UnicodeEncodeError:
        raise UserError("--prompt or --stop is not UTF-8; give text") from None
    if prompt is None:
        prompt = _piped_prompt()
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    if state_out is not None:
        check_writable_file(state_out)
    lm, tokenizer = load(run, checkpoint, device)
    writer = Writer(lm, tokenizer, sampling, fast_reader(lm))
    if state_in is not None:
        writer.load_state(state_in)
    if note := space_warning(tokenizer, prompt):
        tell(f"warning: {note}")
    # a terminal would obey what an untrained model writes
    shown = visible if sys.stdout.isatty() else str
    try:
        print(shown(prompt), end="")
        for text in writer.write(prompt, max_tokens, tuple(s.replace("\\n", "\n") for s in stop)):
            print(shown(text), end="", flush=True)
        print(flush=True)
    except OSError:
        # the reader may have closed the pipe; the state is still wanted
        if state_out is not None:
            writer.save_state(state_out)
        raise
    if state_out is not None:
        writer.save_state(state_out)
    if writer.ended_by == "end-of-text":
        tell(f"ended by end-of-text after {writer.num_written:,} of {max_tokens:,} tokens")


def _piped_prompt() -> str:
    """Read a prompt from a pipe or file on standard input, without the line end of `echo`; empty on a terminal."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):
        # closed by <&-
        return ""
    if not stat.S_ISFIFO(mode) and not stat.S_ISREG(mode):
        return ""
    # an empty pipe that stays open would look like a slow model; select works on pipes except on Windows
    if stat.S_ISFIFO(mode) and os.name == "posix" and not select.select([sys.stdin], [], [], 2.0)[0]:
        tell("waiting for the prompt on standard input; --prompt '' starts without one")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not UTF-8 (offset {error.start}); give text, or --prompt", "unreadable"
        ) from None
    if "\0" in text:
        raise UserError("standard input is binary, not text (it holds a NUL); give text, or --prompt", "unreadable")
    return text.removesuffix("\n").removesuffix("\r")


COMMAND = Command("generate", generate, order=20, aliases=("sample", "write", "complete", "predict", "inference"))
