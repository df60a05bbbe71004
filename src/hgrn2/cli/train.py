"""`hgrn2 train`: train a model."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from hgrn2.cli.command import ARGUMENTS, Command
from hgrn2.cli.config_file import read_toml
from hgrn2.cli.end_of_run import show_end
from hgrn2.cli.key_values import parse_key_values
from hgrn2.cli.model_config import model_config
from hgrn2.cli.parsing import Texts
from hgrn2.cli.processes import choose_processes, main_first
from hgrn2.data.progress import announce
from hgrn2.data.settings import data_settings, prepare_data
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError
from hgrn2.models import HGRN2Config
from hgrn2.storage.staging import check_writable_folder
from hgrn2.tasks.distillation import DistillationOptions, check_teacher
from hgrn2.tasks.registry import option_names
from hgrn2.train.config import BUDGETS, TrainConfig
from hgrn2.train.distributed import joined, launch
from hgrn2.train.freezing import COPIED
from hgrn2.train.parallel import Parallel
from hgrn2.train.run_data import open_prepared
from hgrn2.train.settings import RunSettings
from hgrn2.train.start import Start

_DEFAULT_BUDGET = {"max_steps": 1000}
_RUN = Path("runs/run")


@dataclasses.dataclass(frozen=True)
class TrainFlags(DistillationOptions, TrainConfig):
    """Settings of training and of language tasks as flags; checked after the configuration file is read.

    Attributes:
        given: names of the settings given on the command line; filled in by `parse`.
    """

    given: tyro.conf.Suppress[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check nothing: the configuration file is not read yet."""


def train(
    data: Texts = (),
    validation: Texts = (),
    text_field: str | None = None,
    tokenizer: str | None = None,
    prepared: Path | None = None,
    rebuild: bool = False,
    model: str | None = None,
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    set: Texts = (),
    task: str | None = None,
    task_set: Texts = (),
    out: Path | None = None,
    config: Path | None = None,
    resume: Path | None = None,
    compressors: bool = False,
    processes: int | None = None,
    settings: Annotated[TrainFlags, tyro.conf.OmitArgPrefixes] = TrainFlags(),
) -> int:
    """Train a model, by default a language model on text.

    Without --data it reads the source code of Python's standard library; without a budget (--max-steps, --max-tokens
    or --max-time-s) it takes 1,000 steps.

    Args:
        data: Text files, folders, globs, .jsonl(.zst), .parquet or hf:NAME datasets.
        validation: The same for held-out text (default: hold out one document in twenty).
        text_field: Key or column of the text in .jsonl, .parquet and datasets (default: text).
        tokenizer: bytes, bpe:SIZE to train one, a tokenizer.json, a folder with one, or a Hub name (default: bpe:4096).
        prepared: Folder of the prepared tokens (default: beside the run, named after the data).
        rebuild: Prepare the tokens again even if nothing has changed.
        model: A preset ({presets}) or a JSON file (default: tiny).
        from_: Start with the weights of a model: a run folder, a checkpoint, or a folder (see convert).
        set: Model settings as KEY=VALUE, e.g. --set dropout=0.1 use_short_conv=true.
        task: language (default), distillation (default with --teacher), image, or a synthetic task (see hgrn2 task).
        task_set: Options of the task as KEY=VALUE.
        out: Folder of the run (default: runs/run).
        config: A TOML file with tables [model], [task], [train] and [data]; flags override it.
        resume: A run folder, or one of its checkpoints, to continue; training flags change its settings, --prepared or
            --data name the new place of its data.
        compressors: At the end, compare with gzip -9 and xz -9 on the held-out text.
        processes: Processes on this machine (default: one per GPU).
        settings: Training settings.
    """
    given = {name: getattr(settings, name) for name in settings.given}
    num_processes = choose_processes(processes, given, config, resume)
    if num_processes > 1:
        return launch(ARGUMENTS.get(), num_processes)
    task_options = parse_key_values(task_set, "--task-set", "an option of the task")
    # --out cannot be combined with --resume, even if it names the default
    named_out, out = out, _RUN if out is None else out
    # flags that only tasks on text accept
    of_text = {"data": data, "validation": validation, "text-field": text_field, "tokenizer": tokenizer,
               "prepared": prepared, "rebuild": rebuild, "compressors": compressors}  # fmt: skip
    with joined() as parallel:
        if resume is not None:
            own = {
                "validation": validation, "text-field": text_field, "tokenizer": tokenizer, "rebuild": rebuild,
                "model": model, "from": from_, "set": set, "task": task, "config": config, "out": named_out,
            }  # fmt: skip
            if others := [f"--{name}" for name, value in own.items() if value]:
                raise UserError(
                    f"--resume continues with the run's own data, task and model; drop {' and '.join(others)}",
                    "contradiction",
                )
            run = _resume(resume, given, task_options, of_text, parallel)
        else:
            file = read_toml(config)
            start = None if from_ is None else Start.open(from_)
            if start is not None:
                if model is not None or "preset" in file["model"]:
                    raise UserError(
                        "--from brings its own model; drop --model, and preset from the configuration file",
                        "contradiction",
                    )
                model = str(start.model.path)
            of_text, task_options = _split_data_flags(_task_name(file, task), of_text, task_options)
            run_settings, has_budget = _settings(file, given, task, task_options)
            if run_settings.train.freeze == COPIED and start is None:
                raise UserError(
                    "--freeze copied: nothing is copied without --from; name a folder with it", "contradiction"
                )
            _check_model_settings(set, run_settings.task)
            configure = functools.partial(model_config, model, file["model"], set)
            if not run_settings.task.reads_text:
                settings_of_model = file["model"] | parse_key_values(set, "--set", "a setting of a model")
                configure = functools.partial(_task_model, run_settings, model, settings_of_model, configure)
            begin = _start_text if run_settings.task.reads_text else _start_task
            origin = _Origin(start, of_text, file["data"], has_budget)
            run = begin(out, run_settings, configure, origin, parallel)
        if parallel.is_main:
            show_end(run)
    stopped_by = run.result.stopped_by
    return 128 + int(signal.Signals[stopped_by]) if stopped_by else 0


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where a new run begins.

    Attributes:
        start: the model to take the weights from, or None.
        flags: flags that only tasks on text accept.
        file: table [data] of the configuration file.
        has_budget: whether a budget is named.
    """

    start: Start | None
    flags: Mapping[str, Any]
    file: Mapping[str, Any]
    has_budget: bool


def _check_model_settings(words: Sequence[str], task: type[Any]) -> None:
    """Refuse options of the task among settings of the model."""
    of_model = {field.name for field in dataclasses.fields(HGRN2Config)}
    for key, value in parse_key_values(words, "--set", "a setting of a model").items():
        if key in option_names(task) and key not in of_model:
            raise UserError(
                f"--set {key}: an option of task {task.name!r}, not of the model; use --task-set {key}={value}",
                "unknown-name",
            )


def _settings(
    file: Mapping[str, Any], given: Mapping[str, Any], task: str | None, task_options: Mapping[str, Any]
) -> tuple[RunSettings, bool]:
    """Return the settings of file and flags, checked once, and whether they name a budget."""
    options = dict(file["task"])
    named = options.pop("name", None)
    if named is not None and not isinstance(named, str):
        raise UserError(f"configuration file: task.name is {named!r}; wanted the name of a task")
    if task is not None and task != named:
        # options in the file belong to the task in the file
        options = {}
    elif task is None:
        task = named
    flat = file["train"] | given
    has_budget = not flat.keys().isdisjoint(BUDGETS)
    if not has_budget:
        flat |= _DEFAULT_BUDGET
    return RunSettings.from_flat(flat, task, options | dict(task_options)), has_budget


def _resume(
    path: Path,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    of_text: Mapping[str, Any],
    parallel: Parallel,
) -> Any:
    from hgrn2.data.find_tokenizer import tokenizer_of
    from hgrn2.formats.run_folder import read_config, resume_point
    from hgrn2.tasks import find_task
    from hgrn2.train.runs import resume_language_run, resume_task_run

    run_dir, _ = resume_point(path)
    table = read_config(run_dir).get("task")
    name = table.get("name") if isinstance(table, dict) else None
    if name is not None and not find_task(str(name)).reads_text:
        of_text, options = _split_data_flags(str(name), of_text, options)
        _refuse_text_flags(str(name), of_text)
        return resume_task_run(path, changes=given, task_changes=options, parallel=parallel)
    data = main_first(parallel, lambda: open_prepared(path, of_text["prepared"], of_text["data"]))
    # the run's own tokenizer has the start and end tokens of the model
    sampler = _make_sampler(tokenizer_of(run_dir) or data.tokenizer)
    return resume_language_run(
        path, data, changes=given, task_changes=options, sampler=sampler, compressors=of_text["compressors"],
        parallel=parallel,
    )  # fmt: skip


def _start_text(
    out: Path,
    settings: RunSettings,
    configure: Any,
    origin: _Origin,
    parallel: Parallel,
) -> Any:
    """Prepare the text and train."""
    from hgrn2.train.runs import start_language_run

    start, flags, file = origin.start, origin.flags, origin.file
    defaults = {} if start is None else start.data_defaults(flags["data"] or file.get("data", ()))
    prepared = None if flags["prepared"] is None else str(flags["prepared"])
    sources = data_settings(
        defaults | dict(file), data=list(flags["data"]), validation=list(flags["validation"]),
        text_field=flags["text-field"], tokenizer=flags["tokenizer"], prepared=prepared,
    )  # fmt: skip
    # report mistakes before preparing the data, those of settings first
    configure(None)
    if isinstance(settings.options, DistillationOptions):
        check_teacher(settings.options)
    parallel.on_main(lambda: _check_place(out, settings))

    def check_tokenizer(found: Tokenizer) -> None:
        found.check_fits(configure(found.vocab_size).vocab_size)
        if start is not None:
            start.check_tokens(found)

    # the others reuse what the main rank has prepared
    data, kept = main_first(
        parallel, lambda: prepare_data(sources, out, flags["rebuild"] and parallel.is_main, check_tokenizer)
    )
    # already prepared tokens may come from any tokenizer
    check_tokenizer(data.tokenizer)
    if start is not None:
        data = start.own_tokenizer(data)
    _announce_budget(origin.has_budget)
    return start_language_run(
        out, configure(data.tokenizer.vocab_size), settings, data, data_settings=kept,
        start=None if start is None else start.model, sampler=_make_sampler(data.tokenizer),
        compressors=flags["compressors"], parallel=parallel,
    )  # fmt: skip


def _task_name(file: Mapping[str, Any], task: str | None) -> str | None:
    """Return the name of the task of flag or file; None if neither names one."""
    name = file["task"].get("name") if task is None else task
    return name if isinstance(name, str) else None


def _split_data_flags(
    name: str | None, flags: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Turn --data and --validation into options of a task that has such options.

    Args:
        name: name of the task.
        flags: values of the flags of text.
        options: options of the task.

    Returns:
        The remaining flags, and the options.

    Raises:
        UserError: one of the flags names several paths.
    """
    from hgrn2.tasks import find_task
    from hgrn2.tasks.registry import option_names

    flags, options = dict(flags), dict(options)
    if name is None or (task := find_task(name)).reads_text:
        return flags, options
    for key in ("data", "validation"):
        values = flags[key]
        if not values or key not in option_names(task):
            continue
        if len(values) > 1:
            raise UserError(f"--{key}: task {name!r} takes one path; found {', '.join(values)}")
        options[key] = values[0]
        flags[key] = ()
    return flags, options


def _task_model(settings: RunSettings, model: str | None, keys: Mapping[str, Any], configure: Any) -> Any:
    """Return the configuration of the model of a task that reads no prepared text.

    Args:
        settings: settings of the run.
        model: value of --model.
        keys: settings of the model from file and flags.
        configure: returns the configuration of a language model for a default size of the vocabulary.
    """
    of_task = settings.task.model_settings(settings.options)
    keys = dict(keys)
    preset = keys.pop("preset", None)
    own = settings.task.make_model_config(model if model is not None else preset, of_task | keys)
    return configure(of_task.get("vocab_size")) if own is None else own


def _start_task(
    out: Path,
    settings: RunSettings,
    configure: Any,
    origin: _Origin,
    parallel: Parallel,
) -> Any:
    """Train on a task that reads no prepared text."""
    from hgrn2.train.runs import start_task_run

    start = origin.start
    _refuse_text_flags(settings.task.name, origin.flags)
    if origin.file:
        raise UserError(f"task {settings.task.name!r} reads no text; drop [data] from the file", "contradiction")
    model = configure()
    parallel.on_main(lambda: _check_place(out, settings))
    _announce_budget(origin.has_budget)
    return start_task_run(out, model, settings, start=None if start is None else start.model, parallel=parallel)


def _check_place(out: Path, settings: RunSettings) -> None:
    from hgrn2.devices import choose_device
    from hgrn2.train.checkpoint import check_new_run

    choose_device(settings.train.device)
    check_writable_folder(out)
    check_new_run(out)


def _announce_budget(has_budget: bool) -> None:
    if not has_budget:
        announce("no budget given: 1,000 steps; --max-steps, --max-tokens or --max-time-s set another")


def _refuse_text_flags(task: str, flags: Mapping[str, Any]) -> None:
    if named := [f"--{name}" for name, value in flags.items() if value]:
        raise UserError(f"task {task!r} reads no text; drop {' and '.join(named)}", "contradiction")


def _make_sampler(tokenizer: Any) -> Any:
    """Return a function that writes samples; seeded, so that a resumed run writes the same ones."""
    from hgrn2.inference.writing import Sampling, Writer

    def sampler(model: Any, prompt: str) -> str:
        writer = Writer(model, tokenizer, Sampling(temperature=0.8, top_p=0.95, seed=0))
        return prompt + "".join(writer.write(prompt, 200))

    return sampler


COMMAND = Command(
    "train",
    train,
    order=10,
    # the options that most people need
    common=(
        "data", "validation", "tokenizer", "model", "from_", "set", "task", "task_set", "out", "config", "resume",
        "max_steps", "max_tokens", "max_time_s", "batch_size", "seq_len", "grad_accumulation", "learning_rate",
        "precision", "device", "processes", "seed", "validation_every", "checkpoint_every", "sample_every",
    ),
    aliases=("fit", "run", "pretrain", "finetune", "fine-tune", "resume", "start"),
    needs_output=True,
)  # fmt: skip
