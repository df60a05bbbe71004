"""`hgrn2 eval`: measure a model on texts or on tasks."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from hgrn2.cli.output import show_table
from hgrn2.cli.parsing import Texts
from hgrn2.data.staging import check_file_place, write_text_whole
from hgrn2.errors import UserError
from hgrn2.settings import evaluate_tasks, load_model


def evaluate(
    run: tyro.conf.Positional[Path],
    files: tyro.conf.Positional[tuple[str, ...]],
    text_field: str = "text",
    window: int = 2048,
    tasks: Texts = (),
    tasks_dir: Path | None = None,
    batch_size: str = "auto",
    num_fewshot: int | None = None,
    limit: int | None = None,
    checkpoint: Literal["latest", "best"] = "latest",
    device: str = "auto",
    json_out: Path | None = None,
) -> None:
    """Perplexity and bits a byte of texts of any length, in constant memory; or tasks of lm-evaluation-harness.

    Args:
        run: A run folder, a checkpoint, or a folder of another layout (see convert) with its tokenizer.json.
        files: Text files, folders, globs, .jsonl(.zst) or .parquet.
        text_field: Key or column of the text in .jsonl and .parquet.
        window: Tokens read at a time; does not change the result.
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
    of_files = {"files": files, "--text-field": text_field != "text", "--window": window != 2048}
    of_tasks = {
        "--tasks": tasks, "--tasks-dir": tasks_dir, "--batch-size": batch_size != "auto",
        "--num-fewshot": num_fewshot is not None, "--limit": limit is not None,
    }  # fmt: skip
    flags, others = ([name for name, value in of.items() if value] for of in (of_tasks, of_files))
    if not files and not tasks:
        raise UserError("no file to evaluate; name one or more after the run, or tasks with --tasks")
    if flags and others:
        raise UserError(f"{' and '.join(flags)}: for tasks, {' and '.join(others)}: for texts; evaluate one of them")
    if json_out is not None:
        check_file_place(json_out)
    if tasks:
        table, result = evaluate_tasks(
            run, tasks, tasks_dir=tasks_dir, batch_size=batch_size, num_fewshot=num_fewshot, limit=limit,
            which=checkpoint, device=device,
        )  # fmt: skip
        show = functools.partial(print, table)
    else:
        table, result = _evaluate_texts(run, files, text_field, window, checkpoint, device)
        show = functools.partial(show_table, table)
    # first, for nobody may be there any more to look at the table
    if json_out is not None:
        try:
            write_text_whole(json_out, result)
        except OSError as error:
            raise UserError(f"{json_out}: cannot be written ({error.strerror}); name another file") from None
    show()


def _evaluate_texts(
    run: Path, files: Sequence[str], text_field: str, window: int, checkpoint: str, device: str
) -> tuple[Any, str]:
    """A table for people, and JSON."""
    from rich.markup import escape
    from rich.table import Table

    from hgrn2.data import open_corpus
    from hgrn2.evaluate import score, total

    if window < 1:
        raise UserError(f"--window is {window}; wanted at least 1")
    lm, tokenizer = load_model(run, checkpoint, device)
    scores = [score(lm, tokenizer, document, window) for document in open_corpus(files, text_field).documents()]
    if not scores:
        raise UserError(f"{' '.join(files)}: no text in it; name other files")
    shown = scores if len(scores) == 1 else [*scores, total(scores)]
    table = Table("text", "bytes", "tokens", "perplexity", "bits/byte")
    for column in table.columns[1:]:
        column.justify = "right"
    for s in shown:
        table.add_row(
            escape(s.name), f"{s.num_bytes:,}", f"{s.num_tokens:,}", f"{s.perplexity:,.3f}", f"{s.bits_per_byte:.4f}"
        )
    rows = [dataclasses.asdict(s) | {"perplexity": s.perplexity, "bits_per_byte": s.bits_per_byte} for s in shown]
    return table, json.dumps(rows, indent=1) + "\n"
