"""Texts shown before a command runs: help, version, completion, and the way to install what is missing."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hgrn2
from hgrn2 import cli, extras
from hgrn2.cli.flags import flags_of
from hgrn2.models.presets import PRESETS
from hgrn2.train.settings import FLAT_DEFAULTS

SOURCE = Path(hgrn2.__file__).parents[1]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def shown(capsys, *args):
    capsys.readouterr()
    assert cli.main(list(args)) == 0
    found = capsys.readouterr()
    assert found.err == ""
    return found.out


def python(*args, path=(SOURCE,), **settings):
    return subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, timeout=250,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",), ("--help-all",)])
def test_overview(args, capsys):
    out = shown(capsys, *args)
    for name in cli.COMMANDS:
        assert len(re.findall(rf"^  {name} +\w.*\.$", out, re.MULTILINE)) == 1
    assert len(out.splitlines()) <= 24
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(name, capsys):
    short, whole = shown(capsys, name, "--help"), shown(capsys, name, "--help-all")
    assert shown(capsys, name, "anything", "-h") == short
    assert len(short.splitlines()) <= 60
    for out in (short, whole):
        assert max(map(len, out.splitlines())) <= 80
        assert not re.search(r"None|STR|INT|\(default: \)|default.*default: [^)]*\)\)?\. \(default", out)
    for flag in flags_of(cli.COMMANDS[name].function):
        assert flag.text, flag
        assert len(re.findall(rf"^  {re.escape(flag.label)}( |$)", whole, re.MULTILINE)) == 1, flag
    if short != whole:
        (left_out,) = re.findall(rf"(\d+) further options: hgrn2 {name} --help-all$", short, re.MULTILINE)
        assert len(re.findall("^  --", whole, re.MULTILINE)) == len(re.findall("^  --", short, re.MULTILINE)) + int(
            left_out
        )


def test_help_of_train(capsys):
    short, whole = shown(capsys, "train", "--help"), shown(capsys, "train", "--help-all")
    assert "--data PATH [PATH ...] " in short
    assert "1,000 steps" in short
    assert "(default: 16)" in short
    for name in FLAT_DEFAULTS:
        assert f"  --{name.replace('_', '-')}" in whole
    fields = {flag.field for flag in flags_of(cli.COMMANDS["train"].function)}
    assert set(cli.COMMANDS["train"].common) <= fields


def test_version(capsys):
    assert shown(capsys, "--version") == f"hgrn2 {hgrn2.__version__}\n"


def test_presets_are_listed(capsys):
    out = shown(capsys, "info")
    for name in PRESETS:
        assert f" {name} " in out
    assert "1,364,396,032" in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_completion_in_bash(capsys, tmp_path):
    (tmp_path / "complete.sh").write_text(shown(capsys, "--print-completion", "bash"))
    script = """
    source complete.sh
    words=($(complete -p hgrn2))
    while [ "${words[0]}" != -F ]; do words=("${words[@]:1}"); done
    ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); "${words[1]}"; echo "${COMPREPLY[@]}"; }
    ask hgrn2 gen
    ask hgrn2 train --max-st
    ask hgrn2 convert a b --to f
    ask hgrn2 generate compl
    complete -p hgrn2
    """
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    *found, registered, end = done.stdout.split("\n")
    # without an answer bash completes names of files
    assert found == ["generate", "--max-steps", "fla", ""], done.stderr
    assert "-o default" in registered
    assert end == ""


@pytest.mark.parametrize(
    ("shell", "mark"), [("bash", "complete"), ("zsh", "#compdef hgrn2"), ("fish", "complete --no-files")]
)
def test_completion_scripts(shell, mark, capsys):
    assert mark in shown(capsys, "--print-completion", shell)


# what is not installed


def test_the_way_to_install_is_the_way_it_was_installed(tmp_path, monkeypatch):
    source = Path(extras.__file__).parents[2]
    monkeypatch.chdir(source)
    assert extras.install_command("data") == "pip install -e '.[data]'"
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("data") == f"pip install -e '{source}[data]'"

    def installed(direct_url):
        class Distribution:
            def read_text(self, name):
                assert name == "direct_url.json"
                return direct_url

        monkeypatch.setattr(extras.importlib.metadata, "distribution", lambda name: Distribution())
        return extras.install_command("data")

    monkeypatch.setattr(extras, "__file__", str(tmp_path / "site-packages" / "hgrn2" / "extras.py"))
    assert installed(None) == "pip install 'hgrn2[data]'"
    assert installed("{") == "pip install 'hgrn2[data]'"
    assert installed('{"url": "https://example.org/hgrn2.zip"}') == "pip install 'hgrn2[data]'"
    folder = tmp_path / "a folder"
    folder.mkdir()
    url = f'{{"url": "{folder.as_uri()}", "dir_info": {{}}}}'
    # it is gone, or was a wheel
    assert installed(url) == "pip install 'hgrn2[data]'"
    (folder / "pyproject.toml").touch()
    assert installed(url) == f"pip install '{folder}[data]'"


BLOCKED = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)\n"


def test_without_the_extra_of_the_command_line(tmp_path):
    (tmp_path / "tyro.py").write_text(BLOCKED)
    path = (tmp_path, SOURCE)
    done = python("-m", "hgrn2", "info", "tiny", path=path, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: the command line needs tyro: pip install [^\n]*\[train\]'\n", done.stderr)
    imported = python("-c", "from hgrn2 import cli", path=path)
    assert imported.stderr.endswith("ModuleNotFoundError: No module named 'tyro'\n")


@pytest.mark.slow
def test_tests_that_need_an_extra_are_skipped_without_it(tmp_path):
    for name in ("tyro", "safetensors"):
        (tmp_path / f"{name}.py").write_text(BLOCKED)
    root = Path(__file__).parents[2]
    places = ["tests/cli/test_mistakes.py", "tests/train/test_optim.py", "tests/test_command.py"]
    done = python(
        "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *places, path=(tmp_path, SOURCE), cwd=root
    )
    assert done.returncode == 0, done.stdout
    assert "tyro is not installed" in done.stdout
    assert "safetensors is not installed" in done.stdout


@pytest.mark.parametrize(
    "args", [["--help"], [], ["--version"], ["train", "--help-all"], ["--print-completion", "fish"], ["info"]]
)
def test_help_into_a_closed_pipe_is_quiet(args, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        assert cli.main(args) == 0
    assert capsys.readouterr().err == ""
