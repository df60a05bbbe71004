"""Register mixers, and find them by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hgrn2.errors import UserError
from hgrn2.nn.mixers.base import DirectedMixer, Mixer, MixerOptions
from hgrn2.registries import check_name, has_own_fields, load_entries, unknown_entry

# group of entry points of installed packages
ENTRY_POINTS = "hgrn2.mixers"
# methods that every mixer must define
_PARTS = ("forward", "state_spec", "reset_parameters", "flops", "activation_bytes")


@dataclass(frozen=True)
class RegisteredMixer:
    """A mixer and its options.

    Attributes:
        name: the name in configurations.
        mixer: the class of the mixer.
        options: the class of its options.
    """

    name: str
    mixer: type[Mixer]
    options: type[MixerOptions]

    def build(self, hidden_size: int, options: MixerOptions, backend: str = "auto", direction: str = "causal") -> Mixer:
        """Construct a mixer.

        Args:
            hidden_size: D.
            options: an instance of the class `self.options`.
            backend: name of the operators' backend ("triton", "chunked", ...), or "auto" to choose one per call.
            direction: one of `hgrn2.nn.mixers.directions.DIRECTIONS`.
        """
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        mixer = self.mixer(hidden_size, **values)  # pyright: ignore[reportCallIssue]
        mixer.backend = backend
        mixer.set_direction(direction)
        return mixer


_mixers: dict[str, RegisteredMixer] = {}


M = TypeVar("M", bound=type[Mixer])


def register_mixer(name: str, options: type[MixerOptions]) -> Callable[[M], M]:
    """Return a decorator that registers a mixer class under a name for configurations.

    Args:
        name: the name in `layers` of a configuration, a word of letters, digits, "-" and "_".
        options: a frozen dataclass derived from `MixerOptions`; its fields are arguments of the mixer's constructor.

    Raises:
        UserError: the name is taken or not a word, the class lacks a part of the protocol, or its constructor does not
            take these options.

    Example:
        >>> from dataclasses import dataclass
        >>> from hgrn2.nn.mixers import MixerOptions
        >>> @dataclass(frozen=True)
        ... class DecayOptions(MixerOptions):
        ...     decay: float = 0.9
        >>> decorate = register_mixer("decay", DecayOptions)
    """
    check_name("mixer", name)

    def register(mixer: M) -> M:
        if name in _mixers:
            raise UserError(
                f"mixer {name!r} is registered already, as {_mixers[name].mixer.__qualname__}; choose another name",
                "already-exists",
            )
        missing = _missing_parts(mixer, options)
        if missing:
            raise UserError(f"mixer {name!r} lacks {', '.join(missing)}; see hgrn2.nn.mixers.Mixer", "incomplete")
        _check_constructor(name, mixer, options)
        _mixers[name] = RegisteredMixer(name, mixer, options)
        return mixer

    return register


def _missing_parts(mixer: Any, options: Any) -> list[str]:
    if not (isinstance(mixer, type) and issubclass(mixer, Mixer)):
        return ["the base class Mixer"]
    missing = [part for part in _PARTS if getattr(mixer, part) is getattr(Mixer, part)]
    if issubclass(mixer, DirectedMixer):
        missing += [
            part for part in ("project", "mix", "finish") if getattr(mixer, part) is getattr(DirectedMixer, part)
        ]
    if not has_own_fields(options, MixerOptions):
        missing.append(
            f"options (found {options!r}, wanted a class with @dataclass(frozen=True) and base MixerOptions)"
        )
    return missing


def _check_constructor(name: str, mixer: type[Mixer], options: type[MixerOptions]) -> None:
    """Refuse options that are not the arguments of the constructor after the first, the width."""
    found = {field.name for field in dataclasses.fields(options)}
    arguments = list(inspect.signature(mixer).parameters.values())[1:]
    named = [
        x for x in arguments if x.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    takes_any = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in arguments)
    faults = [f"takes no {key}" for key in sorted(found - {x.name for x in named}) if not takes_any]
    faults += [f"needs {x.name}" for x in named if x.default is inspect.Parameter.empty and x.name not in found]
    if faults:
        raise UserError(
            f"mixer {name!r}: {mixer.__qualname__}(hidden_size, ...) {' and '.join(faults)}; wanted the fields of "
            f"{options.__qualname__} as its arguments ({', '.join(sorted(found)) or 'none'})",
            "contradiction",
        )


def forget_mixer(name: str) -> None:
    """Remove a mixer from the registry, for tests.

    Raises:
        UserError: no mixer has this name.
    """
    if not _is_registered(name):
        raise unknown_entry("mixers", name, "mixer", _mixers, ENTRY_POINTS)
    del _mixers[name]


def _is_registered(name: Any) -> bool:
    # a name of another type may have no hash
    return isinstance(name, str) and name in _mixers


def mixer_names() -> list[str]:
    """Return the names of all mixers, in the order of their registration."""
    return list(_mixers)


def find_mixer(name: str, what: str = "mixers") -> RegisteredMixer:
    """Return a mixer by its name.

    An installed package provides mixers through the entry point group "hgrn2.mixers": the name of the mixer, and the
    module that registers it. The module is imported when the name is first used.

    Args:
        name: the name.
        what: where the name was found, for messages.

    Raises:
        UserError: no mixer has this name (the message suggests similar ones), or the package that brings it cannot be
            imported.
    """
    if isinstance(name, str) and name not in _mixers:
        load_entries(ENTRY_POINTS, name, "mixer", _mixers)
    if not _is_registered(name):
        raise unknown_entry(what, name, "mixer", _mixers, ENTRY_POINTS)
    return _mixers[name]


def check_directions(directions: Sequence[str], names: Sequence[str]) -> None:
    """Raise a UserError if a layer's mixer cannot read in its direction.

    Args:
        directions: the direction of each layer.
        names: the mixer of each layer.
    """
    for direction, name in zip(directions, names, strict=True):
        if direction != "causal" and not issubclass(find_mixer(name).mixer, DirectedMixer):
            able = ", ".join(other for other, found in _mixers.items() if issubclass(found.mixer, DirectedMixer))
            raise UserError(
                f"directions has {direction!r} for the mixer {name}, which can only be causal; others: {able}",
                "unsupported",
            )


def mixers_with_option(key: str) -> list[str]:
    """Return the names of the mixers that have an option of this name."""
    return [
        name for name, found in _mixers.items() if key in (field.name for field in dataclasses.fields(found.options))
    ]
