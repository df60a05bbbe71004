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
from hgrn2.cli.new_run import NewRun
from hgrn2.cli.parsing import Texts
from hgrn2.cli.processes import choose_processes, main_first
from hgrn2.cli.samples import make_sampler
from hgrn2.cli.text_flags import refuse_text_flags, split_data_flags
from hgrn2.errors import UserError
from hgrn2.models import HGRN2Config
from hgrn2.tasks import find_task
from hgrn2.tasks.distillation import DistillationOptions
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
    text_flags = {"data": data, "validation": validation, "text-field": text_field, "tokenizer": tokenizer,
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
            run = _resume(resume, given, task_options, text_flags, parallel)
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
            text_flags, task_options = split_data_flags(_task_name(file, task), text_flags, task_options)
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
            run = NewRun(out, run_settings, configure, start, text_flags, file["data"], has_budget).train(parallel)
        if parallel.is_main:
            show_end(run)
    stopped_by = run.result.stopped_by
    return 128 + int(signal.Signals[stopped_by]) if stopped_by else 0


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
    path: Path, given: Mapping[str, Any], options: Mapping[str, Any], text_flags: Mapping[str, Any], parallel: Parallel
) -> Any:
    from hgrn2.data.find_tokenizer import tokenizer_of
    from hgrn2.formats.run_folder import read_config, resume_point
    from hgrn2.train.runs import resume_language_run, resume_task_run

    run_dir, _ = resume_point(path)
    table = read_config(run_dir).get("task")
    name = table.get("name") if isinstance(table, dict) else None
    if name is not None and not find_task(str(name)).reads_text:
        text_flags, options = split_data_flags(str(name), text_flags, options)
        refuse_text_flags(str(name), text_flags)
        return resume_task_run(path, changes=given, task_changes=options, parallel=parallel)
    data = main_first(parallel, lambda: open_prepared(path, text_flags["prepared"], text_flags["data"]))
    # the run's own tokenizer has the start and end tokens of the model
    sampler = make_sampler(tokenizer_of(run_dir) or data.tokenizer)
    return resume_language_run(
        path, data, changes=given, task_changes=options, sampler=sampler, compressors=text_flags["compressors"],
        parallel=parallel,
    )  # fmt: skip


def _task_name(file: Mapping[str, Any], task: str | None) -> str | None:
    """Return the name of the task of flag or file; None if neither names one."""
    name = file["task"].get("name") if task is None else task
    return name if isinstance(name, str) else None


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
