"""Format the help: an overview of the commands, and the flags of each command, common ones first."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence

import docstring_parser

from hgrn2.cli.command import Command, Function
from hgrn2.cli.flags import Flag, flags_of
from hgrn2.quantities import plural

# column of the descriptions
_INDENT = 28


def overview(commands: Mapping[str, Command]) -> str:
    """Return the overview of commands, one line each."""
    lines = [f"  {name:<11}{_summary(command.function)}" for name, command in commands.items()]
    return "\n".join([
        "usage: hgrn2 COMMAND ...",
        "",
        "HGRN2: language models that are gated linear RNNs with state expansion.",
        "",
        "commands:",
        *lines,
        "",
        "options of a command:  hgrn2 COMMAND --help",
        "version:               hgrn2 --version",
        "completion in a shell: hgrn2 --print-completion bash|zsh|fish",
    ])  # fmt: skip


def command_help(command: Command, *, all_flags: bool) -> str:
    """Return the help of a command.

    Args:
        command: the command.
        all_flags: show more than the common flags.
    """
    name, function, common = command.name, command.function, command.common
    flags = flags_of(function)
    positional = [flag for flag in flags if flag.is_positional]
    options = [flag for flag in flags if not flag.is_positional]
    first = [flag for flag in options if not common or flag.field in common]
    further = [flag for flag in options if flag not in first]
    usage = ["usage: hgrn2", name, *(flag.label for flag in positional), *(["[options]"] if options else [])]
    lines = [" ".join(usage), ""]
    documented = docstring_parser.parse_from_object(function)
    for text in (documented.short_description, documented.long_description):
        lines += [*_wrap(" ".join(text.split()), ""), ""] if text else []
    if positional:
        lines += [*_rows(positional), ""]
    if first:
        lines += ["common options:" if further else "options:", *_rows(first)]
    if further and all_flags:
        lines += ["", "further options:", *_rows(further)]
    elif further:
        lines += ["", f"{plural(len(further), 'further option')}: hgrn2 {name} --help-all"]
    return "\n".join(lines).rstrip()


def _summary(function: Function) -> str:
    return docstring_parser.parse_from_object(function).short_description or ""


def _rows(flags: Sequence[Flag]) -> list[str]:
    rows = []
    for flag in flags:
        label = f"  {flag.label}"
        text = _wrap(flag.text, " " * _INDENT)
        if len(label) < _INDENT - 1 and text:
            text[0] = label.ljust(_INDENT) + text[0][_INDENT:]
        else:
            text.insert(0, label)
        rows += text
    return rows


def _wrap(text: str, indent: str) -> list[str]:
    # long lines are hard to read on wide terminals
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    return textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
