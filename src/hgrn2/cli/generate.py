"""`hgrn2 generate`: write text with a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from hgrn2.cli.parsing import Texts
from hgrn2.data.staging import check_file_place
from hgrn2.errors import UserError
from hgrn2.settings import load_model


def generate(
    run: tyro.conf.Positional[Path],
    prompt: str = "",
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

    Args:
        run: A run folder, a checkpoint, or a folder of another layout (see convert) with its tokenizer.json.
        prompt: Text to continue.
        max_tokens: Most tokens to write.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens that together reach this probability.
        min_p: Keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: Above 1, tokens that were already there become less likely.
        seed: For the same text again.
        stop: Texts that end the writing; \n means a line end.
        state_in: Go on from a state file.
        state_out: Write the state to a file, to go on from it later in the same time however long the text is.
        checkpoint: Which checkpoint of a run.
        device: cpu, cuda or auto.
    """
    from hgrn2.generate import Sampling, Writer

    if max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}; wanted at least 1")
    try:
        "".join([prompt, *stop]).encode()
    except UnicodeEncodeError:
        raise UserError("--prompt or --stop is not UTF-8; give text") from None
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    if state_out is not None:
        check_file_place(state_out)
    lm, tokenizer = load_model(run, checkpoint, device)
    writer = Writer(lm, tokenizer, sampling)
    if state_in is not None:
        writer.load_state(state_in)
    try:
        print(prompt, end="")
        for text in writer.write(prompt, max_tokens, tuple(s.replace("\\n", "\n") for s in stop)):
            print(text, end="", flush=True)
        print(flush=True)
    except OSError:
        # the reader of the text has gone, perhaps; the state is asked for all the same
        if state_out is not None:
            writer.save_state(state_out)
        raise
    if state_out is not None:
        writer.save_state(state_out)
