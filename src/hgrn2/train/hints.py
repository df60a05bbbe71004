"""Commands for the next steps with a run, shown in its report and at its end."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hgrn2.data.tokenizer import Tokenizer
from hgrn2.data.tokens import TokenDataset
from hgrn2.train.config import BUDGETS

# tokens read from the start of a document, enough for a few words of any language
_READ_TOKENS = 96
_MAX_WORDS, _MAX_CHARACTERS = 5, 40
# a longer word comes from text without spaces and is cut
_LONGEST_WORD, _CUT_CHARACTERS = 24, 12
_DOCUMENTS = 32


def first_words(dataset: TokenDataset, tokenizer: Tokenizer) -> str:
    """Return the first words of a document, as a prompt similar to the training text.

    Args:
        dataset: held-out text.
        tokenizer: its tokenizer.

    Returns:
        Printable characters without spaces at the ends; empty if no document starts with any.
    """
    best = ""
    for index in range(min(_DOCUMENTS, dataset.num_documents)):
        tokens = dataset.document_tokens(index, _READ_TOKENS)
        # the last line may be incomplete
        *lines, rest = tokenizer.decode(tokens).split("\n")
        for line in lines or [rest]:
            prompt = _start_of(line)
            # prefer words to comments and headings
            if len(prompt.split()) >= 3 and prompt[0].isalpha():
                return prompt
            best = best or prompt
    return best


def _start_of(line: str) -> str:
    end = next((at for at, c in enumerate(line) if not c.isprintable() or c == "\N{REPLACEMENT CHARACTER}"), len(line))
    line = line[:end].strip()
    if not re.search(r"[^\W_]", line):
        return ""
    words = re.findall(r"\S+", line)[:_MAX_WORDS]
    while len(words) > 1 and len(" ".join(words)) > _MAX_CHARACTERS:
        words.pop()
    if len(words[0]) > _LONGEST_WORD:
        return words[0][:_CUT_CHARACTERS]
    # keep the original spaces between words
    return re.match(r"\s*".join(map(re.escape, words)), line)[0]  # pyright: ignore[reportOptionalSubscript]


def program() -> str:
    """Return how to invoke the command: its name if the shell finds it, otherwise its path."""
    called = Path(sys.argv[0])
    if called.name != "hgrn2":
        return "hgrn2"
    found = shutil.which("hgrn2")
    return "hgrn2" if found is not None and Path(found).resolve() == called.resolve() else shlex.quote(str(called))


def generate_command(run_dir: Path, prompt: str) -> str:
    """Return the command that generates text with a run's model.

    Args:
        run_dir: the run folder.
        prompt: text to continue; empty means the start of a document.
    """
    words = [program(), "generate", shlex.quote(str(run_dir))]
    if prompt:
        words += ["--prompt", shlex.quote(prompt)]
    return " ".join(words)


def resume_command(run_dir: Path, settings: Mapping[str, Any], is_finished: bool) -> str:
    """Return the command that continues training, with twice the budget if it is used up.

    Args:
        run_dir: the run folder.
        settings: settings of its training.
        is_finished: whether the budget is used up.
    """
    words = [program(), "train", "--resume", shlex.quote(str(run_dir))]
    if is_finished:
        for name in BUDGETS:
            if isinstance(budget := settings.get(name), int | float):
                words += [f"--{name.replace('_', '-')}", f"{2 * budget:g}" if budget < 1e5 else str(round(2 * budget))]
    return " ".join(words)


def compressor_caveat(num_read_bytes: int | None, num_parameters: int | None) -> str:
    """Return a caveat for the comparison of a model with compressors.

    Args:
        num_read_bytes: bytes of training text; None if unknown.
        num_parameters: parameters of the model; None if unknown.
    """
    read = "text" if num_read_bytes is None else f"{num_read_bytes / 1e6:,.1f} MB of text"
    weights = "" if num_parameters is None else f" ({4 * num_parameters / 1e6:,.1f} MB)"
    return (
        f"The comparison favours the model: it was trained on {read} of the same kind, and its own size{weights} "
        "is not counted; compressors start from nothing."
    )
