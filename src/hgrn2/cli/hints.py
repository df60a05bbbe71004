"""Turn parser errors into one-line messages with suggestions."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence

from hgrn2.cli.command import Command, known_commands
from hgrn2.cli.flags import Flag
from hgrn2.models import HGRN2Config

# names of flags in other programs; the first one that the command has is suggested
_FLAGS = {
    "max-steps": "steps iters max-iters iterations num-steps train-steps epochs num-epochs num-train-epochs n-epochs",
    "max-tokens": "tokens n num-tokens length max-length max-new-tokens new-tokens num-predict",
    "max-time-s": "time max-time timeout minutes",
    "batch-size": "batch bs b micro-batch-size per-device-train-batch-size",
    "seq-len": "ctx context ctx-len context-length context-size block-size sequence-length seq-length max-seq-len "
    "max-seq-length n-ctx",
    "grad-accumulation": "accumulate grad-accum gradient-accumulation gradient-accumulation-steps accum",
    "learning-rate": "lr max-lr peak-lr",
    "min-lr-fraction": "min-lr",
    "weight-decay": "wd decay",
    "clip-norm": "clip grad-clip clip-grad max-grad-norm grad-norm gradient-clip",
    "warmup-steps": "warmup warmup-iters",
    "optimizer": "optim opt",
    "schedule": "scheduler lr-schedule lr-scheduler lr-scheduler-type lr-decay",
    "precision": "dtype bf16 fp16 amp mixed-precision autocast",
    "num-threads": "threads cpus num-workers workers",
    "device": "gpu cuda cpu",
    "validation": "val valid val-data eval-data held-out",
    "validation-every": "eval-every val-every eval-interval val-interval eval-steps",
    "checkpoint-every": "save-every save-interval save-steps checkpoint-interval",
    "sample-every": "sample-interval",
    "checkpoint": "ckpt step",
    "data": "dataset datasets input corpus train-data train-files",
    "out": "o output output-dir out-dir save-dir run-dir",
    "resume": "continue restart resume-from resume-from-checkpoint",
    "from": "init-from from-pretrained pretrained model-name-or-path load",
    "config": "cfg c",
    "model": "preset size arch m",
    "prompt": "p text",
    "temperature": "temp t",
    "repetition-penalty": "repeat-penalty",
    "stop": "eos stop-sequence stop-strings",
    "json-out": "json output out o output-path",
    "num-fewshot": "fewshot shots",
    "window": "stride chunk seq-len",
    "to": "format layout output-format",
    "max-shard-size": "shard-size",
}
# flags that users of `hgrn2 compare` may look for
_IN_FILE = (
    "models model mixers mixer tasks task seeds seed learning-rates learning-rate learning_rates lr lrs max-steps"
)


def unknown_command(word: str, commands: Mapping[str, Command]) -> str:
    """Return the start of a message about an unknown command."""
    if word.startswith("-"):
        return f"{word.split('=')[0]} comes before the command; name that first: {', '.join(commands)}; "
    near = [name for name, command in commands.items() if word.lower() in command.aliases]
    near = near or difflib.get_close_matches(word.lower(), known_commands(), n=1, cutoff=0.6)
    return f"unknown command {word!r}; {f'did you mean {near[0]}? ' if near else ''}"


def explain(message: str, command: str, flags: Sequence[Flag]) -> str:
    """Rephrase a message of the parser.

    Args:
        message: the message, in one line.
        command: name of the command.
        flags: flags of the command.
    """
    if unknown := re.match(r"Unrecognized (?:options|arguments): (.*)", message):
        words = unknown[1].split(", ")
        return _unknown_words([word for word in words if word], command, flags)
    if choice := re.match(r"invalid choice (.*) for argument '(.*)'\. Expected one of \((.*)\)", message):
        known = choice[3].replace("'", "").rstrip(",").split(", ")
        near = difflib.get_close_matches(choice[1].strip("'"), known, n=1, cutoff=0.7)
        wanted = f"did you mean {near[0]}? wanted" if near else "wanted"
        return f"{choice[2]} is {choice[1]}; {wanted} {_alternatives(known)}"
    if message.startswith("Missing from "):
        # the message starts with the description of the missing argument
        missing = [f for f in flags if f.is_positional and f.text and f.text[:20] in message]
        described = " and ".join(f"{f.name} ({_start_lower(f.text)})" for f in missing)
        return f"{command}: {described} is missing" if len(missing) == 1 else f"{command}: {described} are missing"
    if valueless := re.match(r"Missing value for argument '(.*)'", message):
        return f"{valueless[1]}: its value is missing"
    name, colon, reason = message.removeprefix("Error parsing ").rstrip(".").partition(": ")
    if colon and not name.startswith("-"):
        # the parser names positionals by their type
        name = " or ".join(flag.name for flag in flags if flag.is_positional)
    return f"{name}{colon}{reason}"


def _unknown_words(words: Sequence[str], command: str, flags: Sequence[Flag]) -> str:
    unknown = [word for word in words if word.startswith("-")]
    if command == "compare" and (hint := _comparison_hint(words)):
        return hint
    if not unknown:
        return f"{command}: unexpected {' '.join(repr(word) for word in words)}"
    meant = list(dict.fromkeys(found for word in unknown if (found := _meant(word, flags))))
    hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
    names = " and ".join(dict.fromkeys(word.split("=")[0] for word in unknown))
    return f"{command}: unknown option{'s' if len(set(unknown)) > 1 else ''} {names}{hint}"


def _comparison_hint(words: Sequence[str]) -> str | None:
    """Return a message about models, tasks and axes of the grid, which belong into the file of a comparison."""
    name = words[0].lstrip("-").partition("=")[0]
    if words[0].startswith("-") and name not in _IN_FILE.split():
        return None
    return (
        f"compare: {words[0]} belongs into the file: its tables [models.NAME] and [tasks.NAME], seeds and "
        "learning_rates say what is compared; see examples/compare.toml"
    )


def _meant(word: str, flags: Sequence[Flag]) -> str | None:
    name, _, value = word.lstrip("-").replace("_", "-").partition("=")
    known = {flag.name.lstrip("-"): flag for flag in flags if not flag.is_positional}
    if name in known:
        return f"--{name}"
    # options of synthetic tasks are given by --task-set
    if "task-set" in known and (option := name.replace("-", "_")) in _task_options():
        return f"--task-set {option}={value or 'VALUE'}"
    for flag in known:
        if name.lower() in _FLAGS.get(flag, "").split():
            return f"--{flag}"
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
        return f"--{near[0]}"
    # settings of the model are given by --set
    settings = [field.name for field in dataclasses.fields(HGRN2Config)]
    near = difflib.get_close_matches(name.replace("-", "_"), settings, n=1, cutoff=0.8)
    return f"--set {near[0]}={value or 'VALUE'}" if near and "set" in known else None


def _task_options() -> set[str]:
    from hgrn2.tasks import GENERATORS

    return {field.name for kind in GENERATORS.values() for field in dataclasses.fields(kind)}


def _alternatives(words: Sequence[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _start_lower(text: str) -> str:
    text = text.rstrip(".")
    return text[:1].lower() + text[1:]
