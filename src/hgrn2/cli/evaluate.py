"""`hgrn2 eval`: measure a model on texts or on tasks."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from hgrn2.cli.command import Command
from hgrn2.cli.output import show_table, tell
from hgrn2.cli.parsing import Texts
from hgrn2.errors import UserError, visible
from hgrn2.evaluation.tasks import evaluate_tasks
from hgrn2.loading import load
from hgrn2.storage.staging import check_writable_file, write_text_atomic

if TYPE_CHECKING:
    from hgrn2.inference.scoring import Score

# length from which a note about layers that attend to the whole text is shown
_LONG_TEXT_BYTES = 100_000


def evaluate(
    run: tyro.conf.Positional[Path],
    files: tyro.conf.Positional[tuple[str, ...]],
    text_field: str = "text",
    window: int = 2048,
    each: bool = False,
    tasks: Texts = (),
    tasks_dir: Path | None = None,
    batch_size: str = "auto",
    num_fewshot: int | None = None,
    limit: int | None = None,
    checkpoint: Literal["latest", "best"] = "latest",
    device: str = "auto",
    json_out: Path | None = None,
) -> None:
    """Measure perplexity and bits per byte of texts, or scores on tasks.

    Texts may be of any length; memory does not grow with them, except for models with attention layers that have no
    window. Tasks are those of lm-evaluation-harness.

    Args:
        run: A run folder, a checkpoint, or a folder of another layout (see convert) with its tokenizer.json.
        files: Text files, folders, globs, .jsonl(.zst) or .parquet.
        text_field: Key or column of the text in .jsonl and .parquet.
        window: Tokens read at a time; does not change the result.
        each: A row for every line of a .jsonl or row of a .parquet; otherwise one a file.
        tasks: Instead of files, tasks of lm-evaluation-harness by name, or task files (.yaml).
        tasks_dir: A folder of further task files.
        batch_size: Rows of a task read at a time; auto takes as many as the memory allows.
        num_fewshot: Solved examples before each question of a task (default: as the task says).
        limit: Most questions of a task (default: all).
        checkpoint: Which checkpoint of a run.
        device: cpu, cuda or auto.
        json_out: Write the results to a JSON file as well.
    """
    # a setting of the other kind would have no effect
    of_files = {"files": files, "--text-field": text_field != "text", "--window": window != 2048, "--each": each}
    of_tasks = {
        "--tasks": tasks, "--tasks-dir": tasks_dir, "--batch-size": batch_size != "auto",
        "--num-fewshot": num_fewshot is not None, "--limit": limit is not None,
    }  # fmt: skip
    flags, others = ([name for name, value in of.items() if value] for of in (of_tasks, of_files))
    if not files and not tasks:
        raise UserError("no file to evaluate; name one or more after the run, or tasks with --tasks", "incomplete")
    if flags and others:
        raise UserError(
            f"{' and '.join(flags)}: for tasks, {' and '.join(others)}: for texts; evaluate one of them",
            "contradiction",
        )
    if json_out is not None:
        check_writable_file(json_out)
    if tasks:
        table, result = evaluate_tasks(
            run, tasks, tasks_dir=tasks_dir, batch_size=batch_size, num_fewshot=num_fewshot, limit=limit,
            which=checkpoint, device=device,
        )  # fmt: skip
        show = functools.partial(print, table)
    else:
        table, result = _evaluate_texts(run, files, text_field, window, each, checkpoint, device)
        show = functools.partial(show_table, table)
    # before the table, which may go to a closed pipe
    if json_out is not None:
        try:
            write_text_atomic(json_out, result)
        except OSError as error:
            raise UserError(
                f"{json_out}: cannot be written ({error.strerror}); name another file", "unwritable"
            ) from None
    show()


def _evaluate_texts(
    run: Path, files: Sequence[str], text_field: str, window: int, each: bool, checkpoint: str, device: str
) -> tuple[Any, str]:
    """Return a table for people, and JSON."""
    from hgrn2.data import open_corpus
    from hgrn2.data.progress import progress_bar
    from hgrn2.inference.scoring import score, total

    if window < 1:
        raise UserError(f"--window is {window}; wanted at least 1")
    lm, tokenizer = load(run, checkpoint, device)
    corpus = open_corpus(files, text_field)
    num_bytes = corpus.num_bytes
    attending = lm.config.layer_memories.count("tokens")
    if attending and (num_bytes is None or num_bytes > _LONG_TEXT_BYTES):
        tell(f"note: {attending} layers attend to the whole text; time and memory grow with its length")
    by_source: dict[str, list[Score]] = {}
    with progress_bar("scoring", num_bytes, None) as bar:
        for document in corpus.documents():
            found = score(lm, tokenizer, document, window, bar.advance)
            by_source.setdefault(document.source or document.name, []).append(found)
    if not by_source:
        raise UserError(f"{' '.join(files)}: no text in it; name other files", "not-found")
    rows = [row for found in by_source.values() for row in found]
    if not each:
        rows = [found[0] if len(found) == 1 else total(found, name) for name, found in by_source.items()]
    whole = total(rows)
    for row in rows:
        if loss := row.losses():
            tell(f"warning: {loss}")
    result = {"total": whole.to_dict(), "texts": [row.to_dict() for row in rows]}
    return _table(rows if len(rows) == 1 else [*rows, whole]), json.dumps(result, indent=1) + "\n"


def _table(rows: Sequence[Score]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    lossy = any(row.num_unknown for row in rows)
    names = ["text", "bytes", "tokens", *(["unknown"] if lossy else []), "perplexity", "bits/byte"]
    table = Table(*names)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        bits = "n/a" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        unknown = [f"{row.num_unknown:,}"] if lossy else []
        table.add_row(
            escape(visible(row.name, keep="")), f"{row.num_bytes:,}", f"{row.num_tokens:,}", *unknown,
            f"{row.perplexity:,.3f}", bits,
        )  # fmt: skip
    return table


COMMAND = Command(
    "eval", evaluate, order=30, aliases=("evaluate", "test", "score", "perplexity", "ppl", "bench", "benchmark")
)
