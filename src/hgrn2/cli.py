"""The commands: their flags, what they refuse, what they call, and what they show of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: the command line needs {missing.name}: pip install 'hgrn2[train]'") from None

from hgrn2.data.staging import check_file_place, check_folder_place, staged_directory, write_text_whole
from hgrn2.data.tokenizer import Tokenizer
from hgrn2.errors import UserError
from hgrn2.parsing import command, parse
from hgrn2.settings import (
    Start,
    StartSettings,
    convert_model,
    data_settings,
    evaluate_tasks,
    given_flags,
    load_model,
    model_config,
    open_prepared,
    prepare_data,
    read_toml,
)
from hgrn2.train.config import TrainConfig
from hgrn2.train.display import size
from hgrn2.train.freezing import COPIED

_BUDGETS = {"max_steps", "max_tokens", "max_time_s"}
_DEFAULT_BUDGET = {"max_steps": 1000}
_RUN = Path("runs/run")
_Paths = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """The training settings as flags; checked when the configuration file has been read as well."""

    def __post_init__(self) -> None:
        """Checks nothing yet."""


@command("train")
def train(
    data: _Paths = (),
    validation: _Paths = (),
    text_field: str | None = None,
    tokenizer: str | None = None,
    prepared: Path | None = None,
    rebuild: bool = False,
    model: str | None = None,
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    set: _Paths = (),
    out: Path | None = None,
    config: Path | None = None,
    resume: Path | None = None,
    compressors: bool = False,
    settings: Annotated[TrainFlags, tyro.conf.OmitArgPrefixes] = TrainFlags(),
) -> int:
    """Train a language model on text; without --data, on the source code of Python's standard library.

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
        resume: A run folder, or one of its checkpoints, to go on with; training flags change its settings.
        compressors: At the end, show what gzip -9 and xz -9 make of the held-out text.
        settings: Training settings.
    """
    from hgrn2.train.checkpoint import check_new_run
    from hgrn2.train.run import choose_device, resume_language_run, start_language_run

    given = {name: getattr(settings, name) for name in given_flags(sys.argv[1:], TrainConfig)}
    # by name the default cannot go with --resume either
    named_out, out = out, _RUN if out is None else out
    if resume is not None:
        own = {"data": data, "validation": validation, "text-field": text_field, "tokenizer": tokenizer,
               "prepared": prepared, "rebuild": rebuild, "model": model, "from": from_, "set": set, "config": config,
               "out": named_out}  # fmt: skip
        if others := [f"--{name}" for name, value in own.items() if value]:
            raise UserError(f"--resume goes on with the run's own data and model; drop {' and '.join(others)}")
        prepared_data = open_prepared(resume)
        result = resume_language_run(
            resume, prepared_data, changes=given, sampler=_make_sampler(prepared_data.tokenizer)
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
        if not train_settings.keys() & _BUDGETS:
            train_settings |= _DEFAULT_BUDGET
        train_config = TrainConfig.from_dict(train_settings)
        if train_config.freeze == COPIED and start is None:
            raise UserError("--freeze copied: nothing is copied without --from; name a folder with it")
        # mistakes show before the work of preparing
        choose_device(train_config.device)
        check_folder_place(out)
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
        lm_config = configure(prepared_data.tokenizer.vocab_size)
        result = start_language_run(
            out, lm_config, train_config, prepared_data, data_settings=kept,
            start=None if start is None else start.model, sampler=_make_sampler(prepared_data.tokenizer),
        )  # fmt: skip
    _report(result, prepared_data, out if resume is None else resume, compressors)
    stopped_by = result.result.stopped_by
    return 128 + int(signal.Signals[stopped_by]) if stopped_by else 0


@command("generate")
def generate(
    run: tyro.conf.Positional[Path],
    prompt: str = "",
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: _Paths = (),
    state_in: Path | None = None,
    state_out: Path | None = None,
    checkpoint: Literal["latest", "best"] = "latest",
    device: str = "auto",
) -> None:
    r"""Write text with a trained model.

    Args:
        run: A run folder, a checkpoint, or a folder of another layout (see convert) with its tokenizer.json.
        prompt: Text to continue.
        max_tokens: Most tokens to write.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens that together reach this probability.
        min_p: Keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: Above 1, tokens that were already there become less likely.
        seed: For the same text again.
        stop: Texts that end the writing; \n means a line end.
        state_in: Go on from a state file.
        state_out: Write the state to a file, to go on from it later in the same time however long the text is.
        checkpoint: Which checkpoint of a run.
        device: cpu, cuda or auto.
    """
    from hgrn2.generate import Sampling, Writer

    if max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}; wanted at least 1")
    try:
        "".join([prompt, *stop]).encode()
    except UnicodeEncodeError:
        raise UserError("--prompt or --stop is not UTF-8; give text") from None
    sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p, seed)
    if state_out is not None:
        check_file_place(state_out)
    lm, tokenizer = load_model(run, checkpoint, device)
    writer = Writer(lm, tokenizer, sampling)
    if state_in is not None:
        writer.load_state(state_in)
    try:
        print(prompt, end="")
        for text in writer.write(prompt, max_tokens, tuple(s.replace("\\n", "\n") for s in stop)):
            print(text, end="", flush=True)
        print(flush=True)
    except OSError:
        # the reader of the text has gone, perhaps; the state is asked for all the same
        if state_out is not None:
            writer.save_state(state_out)
        raise
    if state_out is not None:
        writer.save_state(state_out)


@command("eval")
def evaluate(
    run: tyro.conf.Positional[Path],
    files: tyro.conf.Positional[tuple[str, ...]],
    text_field: str = "text",
    window: int = 2048,
    tasks: _Paths = (),
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
        show = functools.partial(_show, table)
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


def _show(table: Any) -> None:
    from rich.console import Console

    # rich itself would end the process with status 1 where the reader has gone
    console = Console()
    with console.capture() as shown:
        console.print(table)
    print(shown.get(), end="")


@command("info")
def info(model: tyro.conf.Positional[str], seq_len: int = 2048, set: _Paths = ()) -> None:
    """Show what a model costs: parameters, operations, memory.

    Args:
        model: A preset, a run folder, a checkpoint, or a JSON file of a model's configuration.
        seq_len: Tokens of a training sequence.
        set: Model settings as KEY=VALUE.
    """
    from rich.markup import escape
    from rich.table import Table

    from hgrn2.models.cost import cost_table

    if seq_len < 1:
        raise UserError(f"--seq-len is {seq_len}; wanted at least 1")
    config = model_config(model, {}, set, None)
    table = Table("", "value", "", title=f"{escape(model)}: {config.summary}")
    table.columns[1].justify = "right"
    for line in cost_table(config, seq_len):
        value = size(line.value) if line.unit == "bytes" else f"{line.value:,}"
        table.add_row(line.label, value, line.note)
    _show(table)


@command("convert")
def convert(
    source: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    to: Literal["hf", "fla", "native", "official"] | None = None,
    dtype: Literal["same", "float32", "bfloat16", "float16"] = "same",
    max_shard_size: str = "5GB",
    checkpoint: Literal["latest", "best"] = "latest",
    from_transformer: bool = False,
    keep_attention: str | None = None,
    expand_ratio: int | None = None,
    copy_qv: bool = False,
    seed: int = 0,
) -> None:
    """Write a checkpoint in another layout, which is told from its own files, or start a model from a Transformer.

    Args:
        source: A run folder, a checkpoint, or a folder in the layout of hgrn2.hf, fla, hgru2-pytorch or a Transformer.
        out: A folder that does not exist yet; it appears whole or not at all.
        to: hf (transformers, after import hgrn2.hf), fla, native (as runs are kept) or official (hgru2-pytorch);
            a start from a Transformer is written as hf unless named.
        dtype: Of the new tensors; same leaves each as it is.
        max_shard_size: Weights above this size are cut into several files; native is always one.
        checkpoint: Which checkpoint of a run.
        from_transformer: Put new recurrent layers into a Transformer (Llama, Mistral, Qwen2); the rest is copied.
        keep_attention: Layers that stay as they are: 3,7,11, every:4 (the last of each four), all or none.
        expand_ratio: Width of a head of the recurrent layers (default: that of the Transformer's heads).
        copy_qv: Start the recurrent layers' q and i from the attention's q and v.
        seed: Of the new tensors.
    """
    start = StartSettings(keep_attention, expand_ratio, copy_qv, seed)
    if not from_transformer and start != StartSettings():
        raise UserError("--keep-attention, --expand-ratio, --copy-qv and --seed go with --from-transformer")
    if to is None and not from_transformer:
        raise UserError("--to is missing; wanted hf, fla, native or official")
    written = convert_model(
        source, out, to or "hf", dtype, max_shard_size, checkpoint, start if from_transformer else None
    )
    files = "" if written.num_shards == 1 else f" in {written.num_shards} files"
    print(f"{written.path}: {written.num_tensors} tensors, {size(written.num_bytes)}{files}")


@command("plot")
def plot(run: tyro.conf.Positional[Path]) -> None:
    """Draw a run's pictures again: loss, lower bounds, forget gates, memory, state norm.

    Args:
        run: A run folder.
    """
    from hgrn2.train.plots import plot_run

    for path in plot_run(run):
        print(path)


@command("tokenizer")
def tokenizer_command(
    out: tyro.conf.Positional[Path],
    data: _Paths = ("stdlib",),
    vocab_size: int = 4096,
    text_field: str = "text",
) -> None:
    """Train a byte-level BPE tokenizer.

    Args:
        out: A new folder for tokenizer.json.
        data: Text files, folders, globs, .jsonl(.zst), .parquet, hf:NAME datasets, or stdlib.
        vocab_size: Tokens of the vocabulary, the 256 bytes and the end of text included.
        text_field: Key or column of the text in .jsonl, .parquet and datasets.
    """
    from hgrn2.data import open_corpus, train_bpe

    check_folder_place(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists already; name another folder")
    pieces = (piece for document in open_corpus(data, text_field).documents() for piece in document.pieces)
    made = train_bpe(pieces, vocab_size)
    with staged_directory(out, replace=False) as stage:
        name = made.save(stage).name
    print(f"{out / name}: {made.vocab_size:,} tokens")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit status: 2 for what the user can mend; 128 + the signal's number when one stopped the work.
    """
    if argv is not None:
        sys.argv[1:] = list(argv)
    warnings.showwarning = lambda message, *_args, **_kwargs: _tell(f"warning: {message}")
    # closed by >&- or 2>&-
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # what a terminal's encoding lacks is replaced, not a reason to stop
        sys.stdout.reconfigure(errors="replace")
    call = status = None
    try:
        try:
            call = parse()
            status = call() or 0
        except SystemExit:
            # help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if isinstance(error, BrokenPipeError) and (status is not None or getattr(call, "func", None) is not train):
            # the reader has gone, as in `hgrn2 generate ... | head`; a run is not done for that, unless it has ended
            _let_go_of_output()
            return status or 0
        if error.filename is not None:
            # a place that cannot be read or written, wherever it was met
            return _refuse(f"{error.filename}: {error.strerror}; name another place, or mend this one")
        if error.strerror is None:
            raise
        return _refuse(f"{error.strerror}; look to the disk, or to where the output goes")
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = f" ({first[0].strip()})" if (first := str(error).splitlines()) else ""
        return _refuse(f"out of memory{reason}; lower batch_size or seq_len, or take a smaller model")


def _tell(line: str) -> None:
    # a closed standard error is no reason to stop
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def _refuse(line: str) -> int:
    _tell(f"error: {line}")
    _let_go_of_output()
    return 2


def _let_go_of_output() -> None:
    """What a closed or full output does not take goes nowhere, or Python would complain of it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    # torch has no type of its own for the CPU, and several texts for a GPU
    words = ("DefaultCPUAllocator", "out of memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def _make_sampler(tokenizer: Any) -> Any:
    """Writes the samples on the way; seeded, so that a resumed run writes the same."""
    from hgrn2.generate import Sampling, Writer

    def sampler(model: Any, prompt: str) -> str:
        writer = Writer(model, tokenizer, Sampling(temperature=0.8, top_p=0.95, seed=0))
        return prompt + "".join(writer.write(prompt, 200))

    return sampler


# what is shown at the end


def _report(run: Any, data: Any, out: Path, compressors: bool) -> None:
    from hgrn2.train.checkpoint import resume_point

    out = resume_point(out)[0]
    result = run.result
    if result.stopped_by:
        return
    for path in run.pictures:
        print(f"picture  {path}")
    record = result.last_validation
    if record:
        print(
            f"held-out text: {record['val_bits_per_byte']:.3f} bits a byte, perplexity {record['val_perplexity']:.2f}"
        )
    if compressors:
        _compare_compressors(data, record)
    print(f"write with it:  hgrn2 generate {shlex.quote(str(out))} --prompt 'def '")


def _compare_compressors(data: Any, record: dict[str, Any] | None) -> None:
    import gzip
    import lzma

    held_out = data.validation
    text = data.tokenizer.decode(held_out.tokens(0, held_out.num_tokens)).encode("utf-8")
    rows = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    print(f"bits a byte on the same {len(text):,} held-out bytes:")
    if record:
        part = record["val_text_bytes"]
        note = "" if part == len(text) else f"   (on {part:,} of them; raise --validation-tokens for all)"
        print(f"  this model  {record['val_bits_per_byte']:.3f}{note}")
    for name, packed in rows.items():
        print(f"  {name:<10}  {8 * len(packed) / len(text):.3f}")


if __name__ == "__main__":
    sys.exit(main())
