"""Generators of synthetic tasks, one per file; they need numpy and nothing else."""

from hgrn2.tasks.generators.base import (
    GENERATORS,
    Examples,
    SyntheticOptions,
    find_generator,
    generate,
    register_generator,
    show,
)
from hgrn2.tasks.generators.draws import Draws
from hgrn2.tasks.generators.mqar import MQAROptions
from hgrn2.tasks.generators.parity import ParityOptions

__all__ = [
    "GENERATORS",
    "Draws",
    "Examples",
    "MQAROptions",
    "ParityOptions",
    "SyntheticOptions",
    "find_generator",
    "generate",
    "register_generator",
    "show",
]
