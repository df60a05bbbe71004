"""`hgrn2 train`: train a language model."""

from __future__ import annotations

import dataclasses
import functools
import signal
from pathlib import Path
from typing import Annotated, Any

import tyro

from hgrn2.cli.config_file import read_toml
from hgrn2.cli.model_config import model_config
from hgrn2.cli.parsing import Texts
from hgrn2.data.progress import announce
from hgrn2.data.settings import data_settings, prepare_data
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError
from hgrn2.storage.staging import check_writable_folder
from hgrn2.train.config import BUDGETS, TrainConfig
from hgrn2.train.freezing import COPIED
from hgrn2.train.run_data import open_prepared
from hgrn2.train.start import Start

# the options that most people need
COMMON = (
    "data", "validation", "tokenizer", "model", "from_", "set", "out", "config", "resume",
    "max_steps", "max_tokens", "max_time_s", "batch_size", "seq_len", "grad_accumulation", "learning_rate",
    "precision", "device", "seed", "validation_every", "checkpoint_every", "sample_every",
)  # fmt: skip

_DEFAULT_BUDGET = {"max_steps": 1000}
_RUN = Path("runs/run")


@dataclasses.dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """The training settings as flags; checked when the configuration file has been read as well.

    Attributes:
        given: names of the settings that were named on the command line; `parse` fills them in.
    """

    given: tyro.conf.Suppress[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check nothing yet."""


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
    out: Path | None = None,
    config: Path | None = None,
    resume: Path | None = None,
    compressors: bool = False,
    settings: Annotated[TrainFlags, tyro.conf.OmitArgPrefixes] = TrainFlags(),
) -> int:
    """Train a language model on text.

    Without --data it reads the source code of Python's standard library; without a budget (--max-steps, --max-tokens
    or --max-time-s) it takes 1,000 steps.

    Args:
        data: Text files, folders, globs, .jsonl(.zst), .parquet or hf:NAME datasets.
        validation: The same for held-out text; by default one document in twenty is held out.
        text_field: Key or column of the text in .jsonl, .parquet and datasets (default: text).
        tokenizer: bytes, bpe:SIZE to train one, a tokenizer.json, a folder with one, or a Hub name (default: bpe:4096).
        prepared: Where the prepared tokens are kept (default: beside the run, in a folder named after the data).
        rebuild: Prepare the tokens again even if nothing has changed.
        model: A preset (tiny, wikitext-44m, 150m, 385m, 1.3b, 2.7b) or a JSON file (default: tiny).
        from_: Start with the weights of a model: a run folder, a checkpoint, or a folder (see convert).
        set: Model settings as KEY=VALUE, e.g. --set dropout=0.1 use_short_conv=true.
        out: Folder of the run (default: runs/run).
        config: A TOML file with tables [model], [train] and [data]; flags win over it.
        resume: A run folder, or one of its checkpoints, to go on with; training flags change its settings, --prepared
            or --data say where its own data is now.
        compressors: At the end, show what gzip -9 and xz -9 make of the held-out text.
        settings: Training settings.
    """
    from hgrn2.data.find_tokenizer import tokenizer_of
    from hgrn2.devices import choose_device
    from hgrn2.formats.run_folder import resume_point
    from hgrn2.train.checkpoint import check_new_run
    from hgrn2.train.run import resume_language_run, start_language_run

    given = {name: getattr(settings, name) for name in settings.given}
    # --out cannot be combined with --resume, even if it names the default
    named_out, out = out, _RUN if out is None else out
    if resume is not None:
        own = {"validation": validation, "text-field": text_field, "tokenizer": tokenizer, "rebuild": rebuild,
               "model": model, "from": from_, "set": set, "config": config, "out": named_out}  # fmt: skip
        if others := [f"--{name}" for name, value in own.items() if value]:
            raise UserError(f"--resume continues with the run's own data and model; drop {' and '.join(others)}")
        prepared_data = open_prepared(resume, prepared, data)
        # the run's own tokenizer knows where the model's texts begin and end
        own_tokenizer = tokenizer_of(resume_point(resume)[0]) or prepared_data.tokenizer
        result = resume_language_run(
            resume, prepared_data, changes=given, sampler=_make_sampler(own_tokenizer), compressors=compressors
        )
    else:
        file = read_toml(config)
        start = None if from_ is None else Start.open(from_)
        if start is not None:
            if model is not None or "preset" in file["model"]:
                raise UserError("--from brings its own model; drop --model, and preset from the configuration file")
            model = str(start.model.path)
        defaults = {} if start is None else start.data_defaults(data or file["data"].get("data", ()))
        sources = data_settings(
            defaults | file["data"], data=list(data), validation=list(validation), text_field=text_field,
            tokenizer=tokenizer, prepared=None if prepared is None else str(prepared),
        )  # fmt: skip
        train_settings = file["train"] | given
        has_budget = not train_settings.keys().isdisjoint(BUDGETS)
        if not has_budget:
            train_settings |= _DEFAULT_BUDGET
        train_config = TrainConfig.from_dict(train_settings)
        if train_config.freeze == COPIED and start is None:
            raise UserError("--freeze copied: nothing is copied without --from; name a folder with it")
        # mistakes show before the work of preparing
        choose_device(train_config.device)
        check_writable_folder(out)
        configure = functools.partial(model_config, model, file["model"], set)
        configure(None)
        check_new_run(out)

        def check_tokenizer(found: Tokenizer) -> None:
            found.check_fits(configure(found.vocab_size).vocab_size)
            if start is not None:
                start.check_tokens(found)

        prepared_data, kept = prepare_data(sources, out, rebuild, check_tokenizer)
        # tokens that were prepared already may be of any tokenizer
        check_tokenizer(prepared_data.tokenizer)
        if start is not None:
            prepared_data = start.own_tokenizer(prepared_data)
        lm_config = configure(prepared_data.tokenizer.vocab_size)
        if not has_budget:
            announce("no budget given: 1,000 steps; --max-steps, --max-tokens or --max-time-s set another")
        result = start_language_run(
            out, lm_config, train_config, prepared_data, data_settings=kept,
            start=None if start is None else start.model, sampler=_make_sampler(prepared_data.tokenizer),
            compressors=compressors,
        )  # fmt: skip
    _show_end(result)
    stopped_by = result.result.stopped_by
    return 128 + int(signal.Signals[stopped_by]) if stopped_by else 0


def _make_sampler(tokenizer: Any) -> Any:
    """Return a function that writes samples; seeded, so that a resumed run writes the same ones."""
    from hgrn2.inference.writing import Sampling, Writer

    def sampler(model: Any, prompt: str) -> str:
        writer = Writer(model, tokenizer, Sampling(temperature=0.8, top_p=0.95, seed=0))
        return prompt + "".join(writer.write(prompt, 200))

    return sampler


def _show_end(run: Any) -> None:
    """Print what a run has reached, and where to look; the last line is the report's path."""
    from hgrn2.train.hints import generate_command
    from hgrn2.train.report.facts import RunFacts

    result = run.result
    # a note has said already that the run had ended before
    if result.stopped_by is None and (run.pictures or not result.had_ended):
        facts = RunFacts.read(result.run_dir)
        record = result.last_validation
        if record:
            bits, unit = _bits(record), "bits per byte"
            bits = f"{unit} {bits}" if record["val_bits_per_byte"] is None else f"{bits} {unit}"
            print(f"held-out text: {bits}, perplexity {record['val_perplexity']:.2f} per token")
        if facts.compressors:
            _show_compressors(facts, record)
        for path in run.pictures:
            print(f"picture  {path}")
        print(f"write with it:  {generate_command(result.run_dir, facts.prompt)}")
    if run.report is not None:
        print(f"report   {run.report}")


def _bits(record: dict[str, Any]) -> str:
    bits = record["val_bits_per_byte"]
    return "n/a (the tokenizer does not keep the whole text)" if bits is None else f"{bits:.3f}"


def _show_compressors(facts: Any, record: dict[str, Any] | None) -> None:
    from hgrn2.train.hints import compressor_caveat

    held_out = facts.compressed_bytes
    print(f"bits per byte on the same {held_out:,} held-out bytes:")
    if record:
        part = record["val_text_bytes"]
        note = "" if part == held_out else f"   (on {part:,} of them; raise --validation-tokens for all)"
        print(f"  this model  {_bits(record)}{note}")
    for name, bits in facts.compressors.items():
        print(f"  {name:<10}  {bits:.3f}")
    print(f"  {compressor_caveat(facts.num_training_bytes, facts.num_parameters)}")
