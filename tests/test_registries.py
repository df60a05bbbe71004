"""Mistakes in what is registered, and in packages that bring it, are refused in words."""

import re
import tomllib
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from hgrn2 import HGRN2Config, cli
from hgrn2.cli import COMMANDS, Command, register_command
from hgrn2.cli.command import register_installed
from hgrn2.cli.flags import flags_of
from hgrn2.nn.mixers import MixerOptions, find_mixer, forget_mixer, mixer_names, register_mixer
from hgrn2.ops import hgrn2_scan
from hgrn2.ops.backends import backend_names, find, register, registered, set_auto_order
from hgrn2.tasks import (
    GENERATORS,
    TASKS,
    SyntheticOptions,
    find_task,
    register_generator,
    register_synthetic_task,
    register_task,
)
from hgrn2.tasks.generators import find_generator
from tests.cli.count_command import COMMAND, count
from tests.models.cases import SIZE
from tests.models.toy_mixer import Average, AverageOptions
from tests.ops.double_backend import DoubleBackend
from tests.ops.scan_cases import tied_inputs
from tests.plug_ins import install
from tests.refusals import refuses
from tests.tasks.repeat_task import Repeat


@dataclass(frozen=True)
class Generator(SyntheticOptions):
    """Draw nothing."""


def add_mixer(name):
    register_mixer(name, AverageOptions)(Average)


def add_backend(name):
    backend = DoubleBackend()
    backend.name = name
    register(backend)


def add_task(name):
    register_task(type("Named", (Repeat,), {"name": name}))


def add_command(name):
    register_command(replace(COMMAND, name=name))


def add_generator(name):
    register_generator(name)(Generator)


ADD = [add_mixer, add_backend, add_task, add_command, add_generator]
FIND = [find_mixer, forget_mixer, find, find_task, find_generator]


def names():
    return [*mixer_names(), *backend_names(), *TASKS, *COMMANDS, *GENERATORS]


@pytest.mark.parametrize("add", ADD)
@pytest.mark.parametrize("name", [3, None, "", "a,b", " a", "a b", "-a", "3", "é", "a\n", ["a"], "a=b"], ids=repr)
def test_a_name_is_a_word(add, name):
    before = names()
    with refuses("invalid-value", repr(name)):
        add(name)
    assert names() == before


@pytest.mark.parametrize("find", FIND)
@pytest.mark.parametrize("name", [3, None, [], "nonono"], ids=repr)
def test_other_names_are_not_found(find, name):
    with refuses("unknown-name", repr(name)):
        find(name)


class Undecorated(MixerOptions):
    size: int = 3


@dataclass(frozen=True)
class Misspelled(MixerOptions):
    slowset: float = 0.1


@dataclass(frozen=True)
class More(AverageOptions):
    more: int = 1


@pytest.mark.parametrize(
    ("options", "mixer", "code", "wanted"),
    [
        (Undecorated, Average, "incomplete", ["Undecorated", "MixerOptions"]),
        (3, Average, "incomplete", [3, "MixerOptions"]),
        (None, Average, "incomplete", [None, "MixerOptions"]),
        (AverageOptions(), Average, "incomplete", ["AverageOptions", "MixerOptions"]),
        (AverageOptions, Average(4, 0.1), "incomplete", ["Mixer"]),
        (AverageOptions, add_mixer, "incomplete", ["Mixer"]),
        (Misspelled, Average, "contradiction", ["slowset", "slowest", "Average", "Misspelled"]),
        (More, Average, "contradiction", ["more"]),
    ],
)
def test_mixers_that_cannot_be_built(options, mixer, code, wanted):
    with refuses(code, "'odd'", *wanted):
        register_mixer("odd", options)(mixer)
    assert "odd" not in mixer_names()


def test_options_of_a_mixer_have_names():
    with refuses("unknown-name", 3, "num_heads"):
        HGRN2Config.from_dict(SIZE | {"layers": "attention", "mixers": {"attention": {3: 3}}})


@pytest.mark.parametrize("odd", [3, "repeat", Repeat.__init__], ids=["number", "name", "function"])
def test_a_task_is_a_class(odd):
    with refuses("invalid-value", repr(odd)):
        register_task(odd)


def test_generators_are_dataclasses():
    class Plain(Generator):
        further: int = 1

    for odd in (Plain, 3, Repeat):
        with refuses("incomplete", "'odd'", repr(odd), "SyntheticOptions"):
            register_generator("odd")(odd)  # pyright: ignore
    with refuses("incomplete", "Plain", "register_generator"):
        register_synthetic_task(Plain)
    assert "odd" not in GENERATORS


def test_a_backend_is_an_object():
    with refuses("invalid-value", "DoubleBackend()"):
        register(DoubleBackend)  # pyright: ignore[reportArgumentType]
    for odd in (None, 3):
        with refuses("incomplete", type(odd).__name__, "forward"):
            register(odd)  # pyright: ignore[reportArgumentType]
        with refuses("incomplete", type(odd).__name__), registered(odd):  # pyright: ignore[reportArgumentType]
            pass


@pytest.mark.parametrize("opaque", ["scan", None, 3, ("scna",), ([],)], ids=repr)
def test_operators_of_a_backend_are_a_tuple(opaque):
    backend = DoubleBackend()
    backend.opaque = opaque
    with refuses("incomplete", "'double'", "opaque"):
        register(backend)
    assert "double" not in backend_names()


def test_auto_is_reserved_and_needs_an_order():
    with refuses("already-exists", "'auto'", "reserved"):
        add_backend("auto")
    with registered(auto_order=()), refuses("unsupported", "'auto'", "set_auto_order"):
        hgrn2_scan(**tied_inputs(1, 3))
    for odd in (3, [], None):
        with refuses("unknown-name", repr(odd)):
            set_auto_order(odd)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(*(hgrn2_scan(**tied_inputs(1, 3))[0] for _ in range(2)))


def untyped(path) -> None:
    """Do nothing."""


def several(*paths: Path) -> None:
    """Do nothing."""


def unreadable(path: "NoSuchType") -> None:  # noqa: F821  # pyright: ignore
    """Do nothing."""


def of_odd_type(value: complex = 0j) -> None:
    """Do nothing."""


def of_two_types(value: int | str = 0) -> None:
    """Do nothing."""


def pairs(value: tuple[int, int] = (0, 0)) -> None:
    """Do nothing."""


def numbers(values: tuple[int, ...] = (1, 2)) -> None:
    """Do nothing.

    Args:
        values: Numbers.
    """


@pytest.mark.parametrize(
    ("command", "code", "wanted"),
    [
        (count, "invalid-value", ["count", "Command"]),
        (None, "invalid-value", ["Command"]),
        (Command("odd", 3), "invalid-value", ["function", 3]),  # pyright: ignore[reportArgumentType]
        (Command("odd", count, common=("nope",)), "unknown-name", ["nope", "unit"]),
        (Command("odd", count, common="unit"), "invalid-value", ["common"]),  # pyright: ignore[reportArgumentType]
        (Command("odd", count, aliases=("train",)), "already-exists", ["'train'"]),
        (Command("odd", count, aliases=(3,)), "invalid-value", ["aliases", 3]),  # pyright: ignore[reportArgumentType]
        (Command("odd", count, order="1"), "invalid-value", ["order", "'1'"]),  # pyright: ignore[reportArgumentType]
        (Command("odd", untyped), "incomplete", ["untyped", "path"]),
        (Command("odd", several), "incomplete", ["several", "paths"]),
        (Command("odd", unreadable), "incomplete", ["unreadable", "NoSuchType"]),
        (Command("odd", of_odd_type), "incomplete", ["of_odd_type", "value", "complex"]),
        (Command("odd", of_two_types), "incomplete", ["value", "int | str"]),
        (Command("odd", pairs), "incomplete", ["value", "tuple[int, int]"]),
    ],
)
def test_commands_that_cannot_be_parsed(command, code, wanted):
    before = dict(COMMANDS)
    with refuses(code, *wanted):
        register_command(command)
    assert before == COMMANDS


def test_defaults_of_several_numbers_are_shown():
    (flag,) = flags_of(numbers)
    assert (flag.label, "1 2" in flag.text) == ("--values N [N ...]", True)


KINDS = {"mixers": find_mixer, "tasks": find_task, "commands": register_installed}
each_kind = pytest.mark.parametrize("group", list(KINDS))


@each_kind
@pytest.mark.parametrize(
    ("source", "code", "wanted"),
    [
        (None, "unavailable", ["ModuleNotFoundError"]),
        ("1 / 0", "unavailable", ["ZeroDivisionError"]),
        ("raise SystemError", "unavailable", ["SystemError"]),
        ("COMMAND = 3", "incomplete", []),
    ],
    ids=["missing", "raises", "says-nothing", "registers-nothing"],
)
def test_packages_that_bring_nothing(tmp_path, monkeypatch, capsys, group, source, code, wanted):
    place = f"bad_{group}_{tmp_path.name.replace('-', '_')}"
    install(tmp_path, monkeypatch, group, f"bad = {place}{':COMMAND' if group == 'commands' else ''}", source)
    with refuses(code, "'bad'", place, *wanted):
        KINDS[group]("bad")
    assert "bad" not in names()
    # the other commands still work
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["--help"]) == 0
    found = capsys.readouterr()
    assert "train" in found.out
    if group == "commands":
        assert place in found.err
    words = {
        "mixers": ["info", "tiny", "--set", "layers=bad"],
        "tasks": ["train", "--task", "bad"],
        "commands": ["bad"],
    }
    assert cli.main(words[group]) == 2
    assert place in capsys.readouterr().err


def test_a_package_whose_registration_is_refused(tmp_path, monkeypatch):
    source = "from tests.test_registries import add_mixer\nadd_mixer('a b')\n"
    install(tmp_path, monkeypatch, "mixers", "bad = refused_by_us", source)
    with refuses("invalid-value", "'bad'", "refused_by_us", "'a b'"):
        find_mixer("bad")


def test_a_command_has_the_name_of_its_entry_point(tmp_path, monkeypatch):
    source = "from tests.cli.count_command import COMMAND\n"
    install(tmp_path, monkeypatch, "commands", "cuont = named_otherwise:COMMAND", source)
    with refuses("incomplete", "'cuont'", "'count'"):
        KINDS["commands"]("cuont")


def test_names_of_packages_are_near(tmp_path, monkeypatch, capsys):
    install(tmp_path, monkeypatch, "commands", "sonderbar = of_nobody:COMMAND", None)
    assert cli.main(["sonderbra"]) == 2
    assert "did you mean sonderbar?" in capsys.readouterr().err


def test_a_saved_name_may_be_that_of_a_missing_package():
    for find_entry, kind in ((find_mixer, "mixer"), (find_task, "task")):
        with refuses("unknown-name", f"{kind} 'gated'", "package"):
            find_entry("gated")
    with refuses("unknown-name", "layers", "mixer 'gated'", "package"):
        HGRN2Config.from_dict(SIZE | {"layers": "gated"})


def test_the_entry_points_of_the_guide(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs/architecture.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL) if "entry-points" in block]
    groups = tomllib.loads(block)["project"]["entry-points"]
    sources = {
        "hgrn2.mixers": ("mixer", "from tests.test_registries import add_mixer\nadd_mixer({!r})\n"),
        "hgrn2.tasks": ("task", "from tests.test_registries import add_task\nadd_task({!r})\n"),
        "hgrn2.commands": (
            "command",
            "from hgrn2.cli import Command\n"
            "from tests.cli.count_command import count\n"
            "COMMAND = Command({!r}, count)\n",
        ),
    }
    assert groups.keys() == sources.keys()
    about, package = tmp_path / "my_package-0.1.dist-info", tmp_path / "my_package"
    about.mkdir()
    package.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 0.1\n")
    lines = []
    for group, entries in groups.items():
        ((name, place),) = entries.items()
        module, source = sources[group]
        assert place.partition(":")[0] == f"my_package.{module}"
        (package / f"{module}.py").write_text(source.format(name))
        lines += [f"[{group}]", f"{name} = {place}"]
    (about / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    before = dict(COMMANDS)
    try:
        assert cli.main(["info", "tiny", "--set", "layers=my_mixer"]) == 0
        assert "my_mixer" in capsys.readouterr().out
        assert find_task("my_task").name == "my_task"
        assert cli.main(["my-command", "--help"]) == 0
    finally:
        forget_mixer("my_mixer")
        TASKS.pop("my_task", None)
        COMMANDS.clear()
        COMMANDS.update(before)
