"""Specifications of runs: of a task that generates its data, and of one that reads prepared text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hgrn2.data.prepared import PreparedData
from hgrn2.errors import UserError
from hgrn2.formats.opening import ModelFolder
from hgrn2.formats.run_folder import read_checkpoint_config
from hgrn2.models import HGRN2Config
from hgrn2.tasks.base import Sampler, TaskContext
from hgrn2.train.ending import compressors_step, gates_step
from hgrn2.train.hints import first_words
from hgrn2.train.parallel import ONE_PROCESS, Parallel
from hgrn2.train.places import to_saved_path
from hgrn2.train.run import RunSpec, SavedRun
from hgrn2.train.settings import RunSettings
from hgrn2.train.warm_up import one_layer_of_each


def task_spec(
    settings: RunSettings,
    model_config: Any,
    *,
    data: PreparedData | None = None,
    sampler: Sampler | None = None,
    start: ModelFolder | None = None,
    parallel: Parallel = ONE_PROCESS,
) -> RunSpec:
    """Return the specification of a run.

    Args:
        settings: settings of training and of the task.
        model_config: configuration of the model: an HGRN2Config, or what `Task.make_model_config` returns.
        data: prepared text, for tasks that read text.
        sampler: writes text samples from the model and a prompt; None writes none.
        start: a model to take the weights from; None initialises them.
        parallel: the ranks that train together.

    Raises:
        UserError: the ranks cannot share a batch evenly.
    """
    task, options, train = settings.task, settings.options, settings.train
    share = parallel.share(train)
    check_batch(train.batch_size, share.num_ranks)

    def build_task(device: torch.device) -> Any:
        batch_size = train.batch_size // share.num_ranks
        context = TaskContext(
            batch_size, train.seed, device, model_config, data, sampler, share.rank, share.num_ranks, share.pieces,
            train.grad_accumulation,
        )  # fmt: skip
        return task.build(options, context)

    def build_model(device: torch.device) -> nn.Module:
        model = task.build_model(options, model_config).to(device)
        if start is not None:
            start.load_into(model)
        return model

    def build_shallow() -> nn.Module:
        return task.build_model(options, one_layer_of_each(model_config))

    shallow = build_shallow if isinstance(model_config, HGRN2Config) else None
    return RunSpec(settings, build_model, build_task, {"model": model_config.to_dict()}, shallow)


def text_spec(
    settings: RunSettings,
    model_config: HGRN2Config,
    data: PreparedData,
    saved_data: Mapping[str, Any],
    *,
    sampler: Sampler | None = None,
    start: ModelFolder | None = None,
    compressors: bool = False,
    parallel: Parallel = ONE_PROCESS,
) -> RunSpec:
    """Return the specification of a run on prepared text.

    Args:
        settings: settings of training and of the task.
        model_config: configuration of the model.
        data: prepared tokens and their tokenizer.
        saved_data: "data" of config.json, made by `saved_data_settings`.
        sampler: writes text samples from the model and a prompt; None writes none.
        start: a model to take the weights from; None initialises them.
        compressors: record how gzip and xz compress the held-out text at the end.
        parallel: the ranks that train together.

    Raises:
        UserError: the vocabulary of the model is smaller than the tokenizer's, or the ranks cannot share a batch
            evenly.
    """
    data.tokenizer.check_fits(model_config.vocab_size)
    spec = task_spec(settings, model_config, data=data, sampler=sampler, start=start, parallel=parallel)
    prompt = getattr(settings.options, "sample_prompt", "")
    return replace(
        spec,
        saved={**spec.saved, "data": dict(saved_data)},
        tokenizer=data.tokenizer,
        describe=partial(_describe_data, data=data, prompt=prompt),
        at_end=(gates_step(data), *([compressors_step(data)] if compressors else [])),
    )


def check_batch(batch_size: int, num_ranks: int) -> None:
    """Raise UserError if ranks cannot share a batch evenly.

    Args:
        batch_size: sequences in a forward pass of all ranks.
        num_ranks: number of ranks.
    """
    if batch_size % num_ranks:
        raise UserError(
            f"batch_size {batch_size} is for all {num_ranks} processes together and does not divide by {num_ranks}; "
            f"use {-(-batch_size // num_ranks) * num_ranks}, or another number of processes",
            "contradiction",
        )


def saved_data_settings(settings: Mapping[str, Any], data: PreparedData, run_dir: Path) -> dict[str, Any]:
    """Return "data" of config.json: settings, and the locations of the tokens and the run."""
    return {**settings, "prepared": to_saved_path(run_dir, data.directory), "run_was_at": os.path.realpath(run_dir)}


def fingerprints(data: PreparedData) -> dict[str, str]:
    """Return the fingerprints of the training and validation tokens."""
    return {"train": data.train.fingerprint, "validation": data.validation.fingerprint}


def check_data(run: SavedRun, data: PreparedData) -> None:
    """Raise UserError if the tokens are not those that the run was started with."""
    wanted = run.config["data"].get("fingerprints")
    # older runs have none; the position in the data still checks the training tokens
    if wanted is None:
        return
    known = wanted if isinstance(wanted, dict) else {}
    differing = [name for name, found in fingerprints(data).items() if known.get(name) != found]
    if differing:
        raise UserError(
            f"{data.directory}: its {' and '.join(differing)} tokens are not those that {run.run_dir} was started "
            "with; name the folder that has them with --prepared, or the same text with --data",
            "mismatch",
        )


def saved_model_config(run: SavedRun) -> Any:
    """Return the model configuration of a run.

    Raises:
        UserError: it differs from that of the checkpoint.
    """
    read = run.settings.task.read_model_config
    config = read(run.config["model"])
    if run.checkpoint is None:
        return config
    saved = read_checkpoint_config(run.checkpoint).get("model")
    if not isinstance(saved, dict):
        raise UserError(f"{run.checkpoint}/config.json: no 'model' settings; name an older checkpoint", "damaged")
    now, before = config.to_dict(), read(saved).to_dict()
    # some keys are written only if they are set
    keys = [key for key in now | before if now.get(key) != before.get(key)]
    if differing := [f"{key} is {now.get(key)!r}, there {before.get(key)!r}" for key in keys]:
        raise UserError(
            f"{run.run_dir}/config.json: the model is not that of {run.checkpoint.name}: {', '.join(differing)}; "
            "restore the file from the checkpoint, or begin another run with --from and --set",
            "mismatch",
        )
    return config


def _describe_data(model: nn.Module, data: PreparedData, prompt: str) -> dict[str, Any]:
    """Return facts about the data for the start record: sizes of both parts, and a prompt."""
    del model
    if not prompt.isprintable() or prompt != prompt.strip() or not prompt:
        prompt = first_words(data.validation, data.tokenizer)
    sizes = {
        side: {"documents": part.num_documents, "text_bytes": part.num_text_bytes, "tokens": part.num_tokens}
        for side, part in (("train", data.train), ("validation", data.validation))
    }
    about = {"tokenizer": data.tokenizer.name, "vocab_size": data.tokenizer.vocab_size}
    return {"data": {**about, **sizes, "skipped": data.manifest.get("skipped", {})}, "prompt": prompt}
