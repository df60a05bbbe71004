"""Open tasks of lm-evaluation-harness: its own, and task files of the user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Entry, Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from hgrn2.data.hub import hub_reachable
from hgrn2.errors import UserError
from hgrn2.evaluation.messages import errors_only, one_line


def open_tasks(names: Sequence[str], folder: Path | None = None) -> list[Task | Group]:
    """Load tasks and their data.

    Args:
        names: names of tasks, groups or tags from the folder or the harness, or paths of task files.
        folder: a folder of further task files. Relative paths of data files in them are resolved against the working
            directory, then against the folder of the task file.

    Raises:
        UserError: a task or its data does not exist, or a file cannot be read.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise UserError("no task named; name one or more, see lm-eval ls tasks")
    manager = _task_manager(names, folder)
    opened: dict[str, Task | Group] = {}
    for name in names:
        try:
            with errors_only("lm_eval"), _without_retries():
                loaded = manager.load(name)
        except Exception as error:  # raised by YAML, functions of the task, datasets or the network
            raise _task_error(name, error) from error
        for task in loaded["tasks"].values():
            _check_metrics(name, task)
        groups = loaded.get("groups", {})
        inner = {child for children in loaded.get("group_map", {}).values() for child in children}
        tops: dict[str, Task | Group] = {key: group for key, group in groups.items() if key not in inner}
        tops = tops or dict(loaded["tasks"])
        if twice := opened.keys() & tops.keys():
            raise UserError(f"task {min(twice)!r} is named twice; leave one out", "contradiction")
        opened |= tops
    return list(opened.values())


def _task_manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """Return a manager that knows all the named tasks."""
    if folder is not None and not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name one with task files (.yaml)", "not-found")
    files = [name for name in names if Path(name).suffix in {".yaml", ".yml"}]
    for path in [*files, *sorted(folder.rglob("*.yaml") if folder else ())]:
        _check_task_file(Path(path))
    include = None if folder is None else str(folder)
    manager = TaskManager(include_path=include, include_defaults=False)
    own = dict(manager.task_index) | {name: _read_entry(Path(name)) for name in files}
    # indexing the thousands of tasks of the harness takes many seconds, but groups and tags may refer to them
    if not all(name in own and own[name].kind in (Kind.TASK, Kind.PY_TASK) for name in names):
        with errors_only("lm_eval"):
            manager = TaskManager(include_path=include)
    for name, entry in own.items():
        manager.task_index[name] = _with_data_paths(entry)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see lm-eval ls tasks, or name a .yaml"
            raise UserError(f"no task named {name!r}; {hint}", "unknown-name")
    return manager


def _check_metrics(name: str, task: Task) -> None:
    """Refuse metrics unknown to the harness, which would silently omit them from the results."""
    if getattr(getattr(task, "config", None), "process_results", None) is not None:
        # the task computes its metrics itself, under names that the harness does not look up
        return
    functions = getattr(task, "_metric_fn_list", None) or {}
    if unknown := [metric for metric, function in functions.items() if function is None]:
        raise UserError(
            f"task {name!r}: metric {unknown[0]!r} is neither the harness's nor on the Hub; correct its name",
            "unknown-name",
        )


def _check_task_file(path: Path) -> None:
    """Refuse files that the harness would silently skip."""
    try:
        load_yaml(path, resolve_func=False)
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read ({error.strerror}); name a task file", "unreadable"
        ) from None
    except Exception as error:
        raise UserError(f"{path}: not a task file: {one_line(error)}", "unreadable") from None


def _read_entry(path: Path) -> Entry:
    try:
        found = TaskIndex.entry_from_path(path)
    except ValueError:
        found = None
    if found is None or not isinstance(found.name, str):
        raise UserError(f"{path}: names no task (a line task: NAME) and no group; name another file", "unreadable")
    return found


def _with_data_paths(entry: Entry) -> Entry:
    """Return the entry with paths of data files resolved against the folder of its task file."""
    if entry.kind is not Kind.TASK or entry.yaml_path is None:
        return entry
    settings = load_yaml(entry.yaml_path, resolve_func=False)
    arguments = settings.get("dataset_kwargs")
    named = arguments.get("data_files") if isinstance(arguments, dict) else None
    resolved = _map_strings(named, lambda text: _resolve_beside(text, entry.yaml_path.parent))  # pyright: ignore
    if resolved == named:
        return entry
    # an entry without a path makes the harness use these settings
    try:
        settings = load_yaml(entry.yaml_path)
    except Exception:  # from functions the file names; the harness raises it again if the task is used
        return entry
    settings["dataset_kwargs"] = {**arguments, "data_files": resolved}  # pyright: ignore[reportGeneralTypeIssues]
    return Entry(entry.name, entry.kind, None, settings, entry.tags)


def _resolve_beside(text: str, folder: Path) -> str:
    place = folder / text
    return str(place) if not Path(text).exists() and place.exists() else text


def _map_strings(value: Any, function: Any) -> Any:
    if isinstance(value, str):
        return function(value)
    if isinstance(value, list):
        return [_map_strings(x, function) for x in value]
    return {key: _map_strings(x, function) for key, x in value.items()} if isinstance(value, dict) else value


def _task_error(name: str, error: Exception) -> UserError:
    """Return the error to raise for a task that cannot be opened."""
    what = f"task {name!r} cannot be opened"
    chain = list(_chain(error))
    offline = any("offline" in f"{type(x).__name__} {x}".lower() or isinstance(x, ConnectionError) for x in chain)
    if offline:
        return UserError(
            f"{what}: its data is not in the local cache, and the Hugging Face Hub cannot be reached (offline); "
            "connect, or name a task file whose data is a local file",
            "unavailable",
        )
    no_rows = isinstance(chain[-1], StopIteration) or (isinstance(error, IndexError) and "size 0" in str(error))
    if no_rows:
        return UserError(f"{what}: its data has no rows; name other data", "unreadable")
    return UserError(f"{what}: {one_line(error)}", "unreadable")


def _chain(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def _without_retries() -> Iterator[None]:
    """While the Hub cannot be reached, fail at once for anything not in the local cache."""
    modules: list[Any] = [huggingface_hub.constants, datasets.config]
    before = [module.HF_HUB_OFFLINE for module in modules]
    offline = not hub_reachable()
    try:
        for module in modules:
            module.HF_HUB_OFFLINE |= offline
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
