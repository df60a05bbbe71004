"""Register mixers, and find them by name."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hgrn2.errors import UserError, unknown_key_message
from hgrn2.nn.mixers.base import Mixer, MixerOptions

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

    def build(self, hidden_size: int, options: MixerOptions, backend: str = "auto") -> Mixer:
        """Construct a mixer.

        Args:
            hidden_size: D.
            options: an instance of the class `self.options`.
            backend: name of the operators' backend ("triton", "chunked", ...), or "auto" to choose one per call.
        """
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        mixer = self.mixer(hidden_size, **values)  # pyright: ignore[reportCallIssue]
        mixer.backend = backend
        return mixer


_mixers: dict[str, RegisteredMixer] = {}


M = TypeVar("M", bound=type[Mixer])


def register_mixer(name: str, options: type[MixerOptions]) -> Callable[[M], M]:
    """Return a decorator that registers a mixer class under a name for configurations.

    Args:
        name: the name in `layers` of a configuration.
        options: a frozen dataclass derived from `MixerOptions`; its fields are arguments of the mixer's constructor.

    Raises:
        UserError: the name is taken, or the class lacks a part of the protocol.

    Example:
        >>> from dataclasses import dataclass
        >>> from hgrn2.nn.mixers import MixerOptions
        >>> @dataclass(frozen=True)
        ... class DecayOptions(MixerOptions):
        ...     decay: float = 0.9
        >>> decorate = register_mixer("decay", DecayOptions)
    """

    def register(mixer: M) -> M:
        if name in _mixers:
            raise UserError(
                f"mixer {name!r} is registered already, as {_mixers[name].mixer.__qualname__}; choose another name",
                "already-exists",
            )
        missing = _missing_parts(mixer, options)
        if missing:
            raise UserError(f"mixer {name!r} lacks {', '.join(missing)}; see hgrn2.nn.mixers.Mixer", "incomplete")
        _mixers[name] = RegisteredMixer(name, mixer, options)
        return mixer

    return register


def _missing_parts(mixer: type, options: type) -> list[str]:
    if not issubclass(mixer, Mixer):
        return ["the base class Mixer"]
    missing = [part for part in _PARTS if getattr(mixer, part) is getattr(Mixer, part)]
    is_frozen = dataclasses.is_dataclass(options) and options.__dataclass_params__.frozen  # pyright: ignore
    if not (issubclass(options, MixerOptions) and is_frozen):
        missing.append("options (a frozen dataclass derived from MixerOptions)")
    return missing


def forget_mixer(name: str) -> None:
    """Remove a mixer from the registry, for tests."""
    del _mixers[name]


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
        UserError: no mixer has this name; the message suggests similar ones.
    """
    if name not in _mixers:
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name):
            entry.load()
    if name not in _mixers:
        raise UserError(unknown_key_message(what, name, _mixers), "unknown-name")
    return _mixers[name]


def mixers_with_option(key: str) -> list[str]:
    """Return the names of the mixers that have an option of this name."""
    return [
        name for name, found in _mixers.items() if key in (field.name for field in dataclasses.fields(found.options))
    ]
