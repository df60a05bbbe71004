"""A language-model run from settings to pictures: what `hgrn2 train` and `hgrn2 train --resume` call."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hgrn2.data.find_tokenizer import check_same_tokens, tokenizer_of
from hgrn2.data.prepared import PreparedData
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.devices import choose_device
from hgrn2.errors import UserError
from hgrn2.formats.opening import ModelFolder, open_folder
from hgrn2.formats.run_folder import locate_model, read_checkpoint_config, read_config, resume_point
from hgrn2.formats.soundness import check_tokenizer
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.storage.lock import run_lock
from hgrn2.train.checkpoint import CheckpointStore, create_run
from hgrn2.train.config import TrainConfig
from hgrn2.train.counters import describe_end
from hgrn2.train.display import Display, make_display
from hgrn2.train.distill import Teacher
from hgrn2.train.ending import Ending
from hgrn2.train.freezing import frozen_names
from hgrn2.train.gates import GATES_NAME
from hgrn2.train.hints import first_words
from hgrn2.train.language import LanguageTask, Sampler
from hgrn2.train.loop import Trainer, TrainResult
from hgrn2.train.places import from_saved_path, to_saved_path
from hgrn2.train.report import REPORT_NAME, write_report
from hgrn2.train.rng import seed_everything


@dataclass(frozen=True)
class LanguageRun:
    """A run that has ended.

    Attributes:
        model: as it is after the last step.
        result: how the run ended.
        pictures: paths of the PNG files; empty if a signal stopped the run.
        report: path of report.html; None if it could not be written.
    """

    model: HGRN2LM
    result: TrainResult
    pictures: list[Path]
    report: Path | None


def start_language_run(
    run_dir: Path,
    model_config: HGRN2Config,
    train_config: TrainConfig,
    data: PreparedData,
    *,
    data_settings: Mapping[str, Any],
    start: ModelFolder | None = None,
    sampler: Sampler | None = None,
    display: Display | None = None,
    compressors: bool = False,
) -> LanguageRun:
    """Train a new model, or go on with the weights of one.

    Args:
        run_dir: a folder to make.
        model_config: the model.
        train_config: how to train it.
        data: prepared tokens and their tokenizer.
        data_settings: JSON values that say what the data was prepared from; kept as "data" in config.json, with the
            place of the prepared tokens and their fingerprints.
        start: where the first weights come from; None: drawn.
        sampler: writes samples from the model and a prompt; None: no samples.
        display: where progress is shown; by default on standard error.
        compressors: at the end, record what gzip and xz make of the held-out text.

    Raises:
        UserError: settings that do not fit each other or the data (nothing is written), or as Trainer.run.
    """
    train_config = train_config.resolved()
    parts = _Parts.build(model_config, train_config, data, sampler)
    if start is not None:
        start.load_into(parts.model)
    kept = _saved_data_settings(data_settings, data, run_dir) | {"fingerprints": _fingerprints(data)}
    config = {"model": model_config.to_dict(), "train": _saved_train_settings(train_config, run_dir), "data": kept}
    with run_lock(run_dir) as check_lock:
        create_run(run_dir, config, data.tokenizer)
        return parts.run(run_dir, config, None, display, check_lock, compressors)


def resume_language_run(
    path: Path,
    data: PreparedData,
    *,
    changes: Mapping[str, Any] | None = None,
    sampler: Sampler | None = None,
    display: Display | None = None,
    compressors: bool = False,
) -> LanguageRun:
    """Go on with a run; on the CPU with the losses it would have had without the stop, to the last bit.

    Args:
        path: a run folder, or one of its checkpoints.
        data: the tokens it was started with, wherever they lie now.
        changes: train settings that are to be different from now on, such as a larger max_steps; config.json
            gets them once the checkpoint goes with them.
        sampler: as for start_language_run.
        display: as for start_language_run.
        compressors: as for start_language_run.

    Raises:
        UserError: there is no run, its checkpoint is damaged, the data or the model is another, or as Trainer.run.
    """
    run_dir, _ = resume_point(path)
    with run_lock(run_dir) as check_lock:
        # a killed process may have left the newest checkpoint under its temporary name
        CheckpointStore(run_dir, 1).remove_leftovers()
        # again: until now another process may have written and removed checkpoints
        _, checkpoint = resume_point(path)
        config = read_config(run_dir)
        check_tokenizer(run_dir)
        for key in ("model", "train", "data"):
            if not isinstance(config.get(key), dict):
                raise UserError(f"{run_dir}/config.json: no {key!r} settings; restore it from a checkpoint of the run")
        if further := config.keys() - {"model", "train", "data"}:
            raise UserError(f"{run_dir}/config.json: unknown keys {sorted(further)}; remove them")
        _check_data(run_dir, config["data"].get("fingerprints"), data)
        model_config = HGRN2Config.from_dict(config["model"])
        if checkpoint is not None:
            _check_model(run_dir, model_config, checkpoint)
        before = _restore_train_settings(config["train"], run_dir, config["data"].get("run_was_at"))
        train_config = TrainConfig.from_dict({**before, **(changes or {})})
        parts = _Parts.build(model_config, train_config, data, sampler)
        config["train"] = _saved_train_settings(train_config, run_dir)
        config["data"] = _saved_data_settings(config["data"], data, run_dir)
        return parts.run(run_dir, config, checkpoint, display, check_lock, compressors)


def _saved_train_settings(config: TrainConfig, run_dir: Path) -> dict[str, Any]:
    """Return the settings as config.json holds them: the run may be resumed from another folder."""
    teacher = None if config.teacher is None else to_saved_path(run_dir, config.teacher)
    return config.to_dict() | {"teacher": teacher}


def _saved_data_settings(settings: Mapping[str, Any], data: PreparedData, run_dir: Path) -> dict[str, Any]:
    return {**settings, "prepared": to_saved_path(run_dir, data.directory), "run_was_at": os.path.realpath(run_dir)}


def _restore_train_settings(settings: Mapping[str, Any], run_dir: Path, was_at: str | None) -> dict[str, Any]:
    """Undo `_saved_train_settings`, and fill in the warmup of older runs, which kept no number for the default."""
    found = dict(settings)
    if isinstance(teacher := found.get("teacher"), str):
        found["teacher"] = str(from_saved_path(run_dir, teacher, was_at))
    if found.get("warmup_steps") is None:
        found["warmup_steps"] = TrainConfig.from_dict(found).num_warmup_steps
    return found


def _describe_start(model: HGRN2LM, data: PreparedData, config: TrainConfig) -> dict[str, Any]:
    """Return facts about the model and the data for the record of a run's start.

    Args:
        model: to train.
        data: prepared tokens.
        config: the settings.

    Returns:
        parameters, data (sizes of both parts), prompt (a few words to continue); JSON values.
    """
    prompt = config.sample_prompt
    if not prompt.isprintable() or prompt != prompt.strip() or not prompt:
        prompt = first_words(data.validation, data.tokenizer)
    sizes = {
        side: {"documents": part.num_documents, "text_bytes": part.num_text_bytes, "tokens": part.num_tokens}
        for side, part in (("train", data.train), ("validation", data.validation))
    }
    about = {"tokenizer": data.tokenizer.name, "vocab_size": data.tokenizer.vocab_size}
    skipped = data.manifest.get("skipped", {})
    return {"parameters": model.num_parameters(), "data": {**about, **sizes, "skipped": skipped}, "prompt": prompt}


def _fingerprints(data: PreparedData) -> dict[str, str]:
    return {"train": data.train.fingerprint, "validation": data.validation.fingerprint}


def _check_data(run_dir: Path, wanted: Any, data: PreparedData) -> None:
    # older runs have none of these; the position in the data knows the training tokens
    if wanted is None:
        return
    known = wanted if isinstance(wanted, dict) else {}
    differing = [name for name, found in _fingerprints(data).items() if known.get(name) != found]
    if differing:
        raise UserError(
            f"{data.directory}: its {' and '.join(differing)} tokens are not those that {run_dir} was started with; "
            "name the folder that has them with --prepared, or the same text with --data"
        )


def _check_model(run_dir: Path, config: HGRN2Config, checkpoint: Path) -> None:
    """Raise UserError if the settings of the run are not those that the checkpoint's weights were trained with."""
    saved = read_checkpoint_config(checkpoint).get("model")
    if not isinstance(saved, dict):
        raise UserError(f"{checkpoint}/config.json: no 'model' settings; name an older checkpoint")
    now, before = config.to_dict(), HGRN2Config.from_dict(saved).to_dict()
    if differing := [f"{key} is {now[key]!r}, there {before[key]!r}" for key in now if now[key] != before[key]]:
        raise UserError(
            f"{run_dir}/config.json: the model is not that of {checkpoint.name}: {', '.join(differing)}; "
            "restore the file from the checkpoint, or begin another run with --from and --set"
        )


@dataclass(frozen=True)
class _Parts:
    """Everything a run needs, checked before the run folder is touched."""

    model: HGRN2LM
    task: LanguageTask
    config: TrainConfig
    data: PreparedData
    frozen: list[str]

    @classmethod
    def build(
        cls, model_config: HGRN2Config, config: TrainConfig, data: PreparedData, sampler: Sampler | None
    ) -> _Parts:
        data.tokenizer.check_fits(model_config.vocab_size)
        device = choose_device(config.device)
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        teacher = None if config.teacher is None else _open_teacher(config, model_config, data.tokenizer, device)
        task = LanguageTask(data.train, data.validation, config, device, sampler, teacher)
        seed_everything(config.seed)
        model = HGRN2LM(model_config).to(device)
        model.activation_checkpointing = config.activation_checkpointing
        if config.compile:
            model.model.compile_blocks()
        return cls(model, task, config, data, frozen_names(model, config.freeze))

    def run(
        self,
        run_dir: Path,
        run_config: Mapping[str, Any],
        resume_from: Path | None,
        display: Display | None,
        check_lock: Callable[[], None],
        compressors: bool,
    ) -> LanguageRun:
        display = display or make_display()
        trainer = Trainer(
            model=self.model,
            task=self.task,
            roles=self.model.parameter_roles(),
            config=self.config,
            run_dir=run_dir,
            run_config=run_config,
            resume_from=resume_from,
            frozen=self.frozen,
            display=display,
            check_lock=check_lock,
            about=_describe_start(self.model, self.data, self.config),
        )
        try:
            result = trainer.run()
        except UserError:
            # the report may show why the run stopped
            if trainer.has_started:
                with suppress(UserError, OSError):
                    check_lock()
                    write_report(run_dir)
            raise
        ending = Ending(run_dir, self.model, self.data, choose_device(self.config.device), display.note)
        if result.stopped_by:
            return LanguageRun(self.model, result, [], ending.report())
        if compressors:
            ending.compare_compressors(result.counters.step)
        elif result.had_ended and _is_drawn(run_dir):
            display.note(f"{run_dir}: {describe_end(self.config, result.counters)}")
            return LanguageRun(self.model, result, [], run_dir / REPORT_NAME)
        report = ending.report()
        return LanguageRun(self.model, result, ending.pictures(), report)


def _is_drawn(run_dir: Path) -> bool:
    """Whether the report and all pictures of a run exist; a full disk may have prevented some."""
    if not (run_dir / REPORT_NAME).exists():
        return False
    names = {path.name for path in (run_dir / "plots").glob("*.png")}
    return "memory.png" in names if (run_dir / GATES_NAME).exists() else bool(names)


def _open_teacher(config: TrainConfig, student: HGRN2Config, tokenizer: Tokenizer, device: torch.device) -> Teacher:
    assert config.teacher is not None
    try:
        folder, tokenizer_dir = locate_model(Path(config.teacher))
        opened = open_folder(folder)
    except UserError as error:
        # a run that is resumed remembers where its teacher was
        raise UserError(f"teacher {error}; if the teacher has moved, name its new place: --teacher NEW") from None
    if opened.config.vocab_size != student.vocab_size:
        raise UserError(
            f"teacher {folder}: has a vocabulary of {opened.config.vocab_size}, the model one of "
            f"{student.vocab_size}; wanted the same tokens"
        )
    check_same_tokens(tokenizer_of(tokenizer_dir), tokenizer, f"teacher {folder}")
    return Teacher(opened.load(device), config)
