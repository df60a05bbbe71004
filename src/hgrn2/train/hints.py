"""Next steps with a run as commands to copy, shown in its report and when it ends."""

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

# tokens read from the start of a document: enough for a few words of any language
_READ_TOKENS = 96
_MOST_WORDS, _MOST_CHARACTERS = 5, 40
# a longer word comes from a text without spaces, and is cut
_LONGEST_WORD, _CUT_CHARACTERS = 24, 12
_DOCUMENTS = 32


def first_words(dataset: TokenDataset, tokenizer: Tokenizer) -> str:
    """Return the first words of a document: a prompt of the kind that the model has learnt to continue.

    Args:
        dataset: held-out text.
        tokenizer: its tokenizer.

    Returns:
        Printable characters without a space at either end; empty if no document begins with any.
    """
    best = ""
    for index in range(min(_DOCUMENTS, dataset.num_documents)):
        tokens = dataset.document_tokens(index, _READ_TOKENS)
        # the last line may be longer than what was read
        *lines, rest = tokenizer.decode(tokens).split("\n")
        for line in lines or [rest]:
            prompt = _start_of(line)
            # a comment or a heading is a worse beginning than words
            if len(prompt.split()) >= 3 and prompt[0].isalpha():
                return prompt
            best = best or prompt
    return best


def _start_of(line: str) -> str:
    end = next((at for at, c in enumerate(line) if not c.isprintable() or c == "\N{REPLACEMENT CHARACTER}"), len(line))
    line = line[:end].strip()
    if not re.search(r"[^\W_]", line):
        return ""
    words = re.findall(r"\S+", line)[:_MOST_WORDS]
    while len(words) > 1 and len(" ".join(words)) > _MOST_CHARACTERS:
        words.pop()
    if len(words[0]) > _LONGEST_WORD:
        return words[0][:_CUT_CHARACTERS]
    # keep the original spaces between the words
    return re.match(r"\s*".join(map(re.escape, words)), line)[0]  # pyright: ignore[reportOptionalSubscript]


def program() -> str:
    """Return how to call the command as it was called: its name where the shell finds it, else its path."""
    called = Path(sys.argv[0])
    if called.name != "hgrn2":
        return "hgrn2"
    found = shutil.which("hgrn2")
    return "hgrn2" if found is not None and Path(found).resolve() == called.resolve() else shlex.quote(str(called))


def generate_command(run_dir: Path, prompt: str) -> str:
    """Return the command that writes with a run's model.

    Args:
        run_dir: the run folder.
        prompt: text to continue; empty: the start of a document.
    """
    words = [program(), "generate", shlex.quote(str(run_dir))]
    if prompt:
        words += ["--prompt", shlex.quote(prompt)]
    return " ".join(words)


def resume_command(run_dir: Path, settings: Mapping[str, Any], is_finished: bool) -> str:
    """Return the command that trains on: to the end of the budget, or for twice the budget when that is used up.

    Args:
        run_dir: the run folder.
        settings: of its training.
        is_finished: whether the budget is used up.
    """
    words = [program(), "train", "--resume", shlex.quote(str(run_dir))]
    if is_finished:
        for name in BUDGETS:
            if isinstance(budget := settings.get(name), int | float):
                words += [f"--{name.replace('_', '-')}", f"{2 * budget:g}" if budget < 1e5 else str(round(2 * budget))]
    return " ".join(words)


def compressor_caveat(num_read_bytes: int | None, num_parameters: int | None) -> str:
    """Return why the comparison of a model with compressors is not quite fair.

    Args:
        num_read_bytes: text the model was trained on; None: not known.
        num_parameters: of the model; None: not known.
    """
    read = "text" if num_read_bytes is None else f"{num_read_bytes / 1e6:,.1f} MB of text"
    weights = "" if num_parameters is None else f" ({4 * num_parameters / 1e6:,.1f} MB)"
    return (
        f"The comparison flatters the model: it has been trained on {read} of the same kind, and its own size{weights} "
        "is not counted; compressors start from nothing."
    )
