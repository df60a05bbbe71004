"""A new command is one file: it has help, runs, and its mistakes are one line."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from hgrn2 import cli
from hgrn2.cli import COMMANDS, Command, register_command
from tests.cli import count_command
from tests.plug_ins import install
from tests.refusals import refuses


@pytest.fixture(autouse=True)
def _registered(monkeypatch, tmp_path):
    before = dict(COMMANDS)
    register_command(count_command.COMMAND)
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("one two three\nfour\n")
    yield
    COMMANDS.clear()
    COMMANDS.update(before)


def call(capsys, *words):
    status = cli.main(list(words))
    found = capsys.readouterr()
    return status, found.out, found.err


def test_it_is_one_short_file():
    assert len(Path(count_command.__file__).read_text().splitlines()) < 60


def test_it_runs(capsys):
    assert call(capsys, "count", "text") == (0, "4\n", "")
    assert call(capsys, "count", "text", "--unit", "lines", "--most", "1") == (0, "1\n", "")
    Path("empty").touch()
    assert call(capsys, "count", "empty") == (1, "0\n", "")


def test_its_help(capsys):
    assert "\n  count      Count what is in a text.\n" in call(capsys, "--help")[1]
    # after those of the package
    assert list(COMMANDS)[-1] == "count"
    short, whole = (call(capsys, "count", flag)[1] for flag in ("--help", "--help-all"))
    assert "--unit words|lines" in short
    assert "1 further option: hgrn2 count --help-all" in short
    assert "--most N" in whole
    assert "count" in call(capsys, "--print-completion", "bash")[1]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["wc"], ["'wc'", "count"]),
        (["cuont"], ["'cuont'", "count"]),
        (["count"], ["TEXT", "missing"]),
        (["count", "none"], ["none"]),
        (["count", "text", "--unti", "words"], ["--unti", "--unit"]),
        (["count", "text", "--unit", "word"], ["--unit", "'word'", "words"]),
        (["count", "text", "--most", "x"], ["--most", "'x'"]),
    ],
)
def test_mistakes_are_one_line(words, names, capsys):
    status, out, error = call(capsys, *words)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert not [name for name in names if name not in error], error


def test_an_installed_package_brings_its_command(tmp_path, monkeypatch, capsys):
    source = (
        "from hgrn2.cli import Command\n"
        "from tests.cli.count_command import count\n"
        "COMMAND = Command('brought', count)\n"
    )
    install(tmp_path, monkeypatch, "commands", "brought = command_of_another:COMMAND", source)
    assert "'brough'" in call(capsys, "brough", "text")[2]
    assert call(capsys, "brought", "text") == (0, "4\n", "")
    del COMMANDS["brought"]
    assert "\n  brought " in call(capsys, "--help")[1]


def test_a_name_is_taken_once():
    for command in (count_command.COMMAND, Command("train", count_command.count)):
        with refuses("already-exists", command.name):
            register_command(command)


def test_a_command_without_help():
    def silent():
        pass

    with refuses("incomplete", "silent"):
        register_command(Command("silent", silent))
    assert "silent" not in COMMANDS


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields of every kind that flags have.

    Attributes:
        number: A number.
        part: A part.
        word: A word.
        choice: A choice.
        most: A bound.
        switch: A switch.
        given: Names of the fields that were named.
    """

    number: int = 3
    part: float = 0.5
    word: str = ""
    choice: Literal["a", "b"] = "a"
    most: int | None = None
    switch: bool = False
    given: tyro.conf.Suppress[tuple[str, ...]] = ()


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], ()),
        # defaults that are named, and values next to the default
        (["--number", "3", "--switch"], ("number", "switch")),
        (["--number", "4", "--part=1.5", "--word", "x"], ("number", "part", "word")),
        (["--part", "nan", "--most", "None", "--no-switch"], ("part", "most", "switch")),
        (["--choice", "b", "--most", "0"], ("choice", "most")),
    ],
)
def test_a_command_knows_which_fields_were_named(words, given):
    found = []

    def keep(settings: Annotated[Settings, tyro.conf.OmitArgPrefixes] = Settings()) -> None:
        """Keep the settings.

        Args:
            settings: Settings.
        """
        found.append(settings)

    register_command(Command("keep", keep))
    assert cli.main(["keep", *words]) == 0
    assert found[0].given == given
