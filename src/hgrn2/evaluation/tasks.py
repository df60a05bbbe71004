"""Evaluate a model folder on tasks of lm-evaluation-harness; the harness is imported on the first call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hgrn2.errors import UserError
from hgrn2.extras import install_command
from hgrn2.formats.run_folder import locate_model, read_while_training
from hgrn2.loading import load


def evaluate_tasks(
    run: Path, names: Sequence[str], *, tasks_dir: Path | None, batch_size: str, num_fewshot: int | None,
    limit: int | None, which: str, device: str,
) -> tuple[str, str]:  # fmt: skip
    """Run tasks of lm-evaluation-harness.

    Args:
        run: a run folder, one of its checkpoints, or a folder of any layout.
        names: tasks and task files; one string may hold several, separated by commas.
        tasks_dir: a folder of further task files.
        batch_size: a number or "auto".
        num_fewshot: solved examples before each question; None leaves it to the task.
        limit: maximum number of questions per task; None means all.
        which: the checkpoint of a run, "latest" or "best".
        device: "cpu", "cuda", ...; "auto" takes the first GPU if there is one.

    Returns:
        A table for people, and the harness's results as JSON.

    Raises:
        UserError: a number is out of range, an extra is not installed, or a task or its data does not exist.
    """
    words = [name if Path(name).exists() else name.split(",") for name in names]
    names = [name.strip() for word in words for name in ([word] if isinstance(word, str) else word) if name.strip()]
    # no memory holds batches of ten digits, and int() refuses thousands of digits
    if batch_size != "auto" and not (batch_size.isdecimal() and len(batch_size) < 10 and int(batch_size) > 0):
        raise UserError(f"--batch-size is {batch_size}; wanted a number from 1 to 999999999, or auto")
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num-fewshot is {num_fewshot}; wanted at least 0")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; wanted at least 1")
    try:
        from hgrn2.evaluation import harness, harness_tasks
    except ModuleNotFoundError as missing:
        raise UserError(
            f"--tasks needs {missing.name}, which is not installed: {install_command('eval')}", "unavailable"
        ) from None
    weights, folder = read_while_training(run, lambda: locate_model(run, which))
    tasks = harness_tasks.open_tasks(names, tasks_dir)
    model, tokenizer = harness.open_for_transformers(*load(run, which, device), folder)
    # the harness copies this name into its results
    model.config.name_or_path = str(weights)
    lm = harness.HGRN2Harness(model, tokenizer, batch_size)
    results = harness.evaluate_tasks(lm, tasks, num_fewshot=num_fewshot, limit=limit)
    return harness.results_table(results), harness.results_json(results)
