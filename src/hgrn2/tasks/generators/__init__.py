"""Generators of synthetic tasks, one per file; they need numpy and nothing else."""

from hgrn2.tasks.generators.associative_recall import AssociativeRecallOptions
from hgrn2.tasks.generators.base import (
    GENERATORS,
    Examples,
    SyntheticOptions,
    find_generator,
    generate,
    register_generator,
    show,
)
from hgrn2.tasks.generators.copying import CopyingOptions
from hgrn2.tasks.generators.draws import Draws
from hgrn2.tasks.generators.induction import InductionOptions
from hgrn2.tasks.generators.listops import ListOpsOptions
from hgrn2.tasks.generators.modular_addition import ModularAdditionOptions
from hgrn2.tasks.generators.mqar import MQAROptions
from hgrn2.tasks.generators.needle import NeedleOptions
from hgrn2.tasks.generators.parity import ParityOptions
from hgrn2.tasks.generators.permutations import PermutationsOptions
from hgrn2.tasks.generators.selective_copying import SelectiveCopyingOptions

__all__ = [
    "GENERATORS",
    "AssociativeRecallOptions",
    "CopyingOptions",
    "Draws",
    "Examples",
    "InductionOptions",
    "ListOpsOptions",
    "MQAROptions",
    "ModularAdditionOptions",
    "NeedleOptions",
    "ParityOptions",
    "PermutationsOptions",
    "SelectiveCopyingOptions",
    "SyntheticOptions",
    "find_generator",
    "generate",
    "register_generator",
    "show",
]
