"""The command line, called as a person would."""

import os

from hgrn2 import cli


def run_cli(capsys, *args):
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def refused(capsys, args, message):
    """In one line, with status 2, and nothing left behind."""
    before = sorted(os.listdir())
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert message in found.err
    assert sorted(os.listdir()) == before
