"""Generators of synthetic tasks: examples from options and a seed, the same on every platform."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np

from hgrn2.constraints import Ge, Le
from hgrn2.errors import UserError, unknown_key_message
from hgrn2.registries import check_name, has_own_fields
from hgrn2.tasks.generators.draws import Draws, Ints
from hgrn2.tasks.options import TaskOptions

IGNORE = -100
MAX_TOKENS = 2**20
# streams of a seed
TRAINING, VALIDATION = 0, 1
# examples per block, and tokens per block of long examples
_BLOCK_EXAMPLES, _BLOCK_TOKENS = 1024, 2**18
_SEEDS = 2**64

Length = Annotated[int, Ge(2), Le(MAX_TOKENS)]


class Examples(NamedTuple):
    """Examples of a task.

    Attributes:
        inputs: [N, T] int64.
        targets: [N, T] int64, the right answer at each position; -100 where none counts.
    """

    inputs: Ints
    targets: Ints

    def checksum(self) -> str:
        """Return the SHA-256 of inputs and targets, both as little-endian int64."""
        digest = hashlib.sha256()
        for values in self:
            digest.update(np.ascontiguousarray(values, "<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class SyntheticOptions(TaskOptions):
    """Options of a synthetic task: the distribution of its examples, and the sets for training and validation.

    A generator is a subclass with `vocab_size`, which may be a field or a property, and the method `draw`. Its number
    of targets per example must follow from the options.
    """

    name: ClassVar[str]
    """Name of the task; set by `register_generator`."""

    length: Length = 64
    """Tokens of an example."""
    validation_examples: Annotated[int, Ge(1), Le(10**6)] = 1000
    """Examples of a validation, drawn from a separate stream."""
    training_examples: Annotated[int, Ge(0), Le(10**7)] = 0
    """Examples of a fixed training set, shuffled in every epoch; 0: every example is new."""
    eval_lengths: tuple[int, ...] = ()
    """Other lengths to validate at, such as [128, 256]."""
    eval_at: tuple[Mapping[str, Any], ...] = ()
    """Other options to validate at, such as [{"length": 256, "num_pairs": 16}]."""
    vocab_size: ClassVar[int]
    """Number of tokens; a field of generators where it is a choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_lengths", "eval_at"):
            value = getattr(self, name)
            # lists come from files and from the command line, and a single value means a list of one
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif isinstance(value, Mapping) or type(value) is int:
                object.__setattr__(self, name, (value,))
            elif not isinstance(value, tuple):
                example = "[128, 256]" if name == "eval_lengths" else '[{"length": 128}]'
                raise UserError(f"{self.what}: {name} is {value!r}; wanted a list, such as {example}")
        self.check()
        # refuses what does not fit, before anything is trained
        for found in self.evaluations().values():
            if found.vocab_size != self.vocab_size:
                raise UserError(
                    f"{self.what}: eval_at leads to a vocabulary of {found.vocab_size}, training to one of "
                    f"{self.vocab_size}; change options that keep it",
                    "contradiction",
                )

    @property
    def tokens_per_example(self) -> int:
        """Tokens of an example."""
        return self.length

    def check(self) -> None:
        """Check rules between fields.

        Raises:
            UserError: no example can have these options.
        """

    def draw(self, draws: Draws) -> Examples:
        """Return `draws.num_rows` examples; every random number comes from `draws`."""
        raise NotImplementedError

    def word(self, token: int) -> str:
        """Return the text that stands for a token."""
        return str(token)

    def evaluations(self) -> dict[str, Self]:
        """Return the options of further validations, by the name of their changes, e.g. "length_128"."""
        changes = [{"length": length} for length in self.eval_lengths] + list(self.eval_at)
        changed = [self._changed(change) for change in changes]
        names = ["_".join(f"{key}_{value}" for key, value in change.items()) for change in changes]
        return dict(zip(names, changed, strict=True))

    def _changed(self, change: Any) -> Self:
        own = {field.name for field in dataclasses.fields(self) if field.init}
        own -= {field.name for field in dataclasses.fields(SyntheticOptions)} - {"length"}
        if not isinstance(change, Mapping) or not change:
            raise UserError(f'{self.what}: eval_at holds {change!r}; wanted options, such as {{"length": 128}}')
        for key in change:
            if key not in own:
                raise UserError(unknown_key_message(f"{self.what}: eval_at", str(key), own), "unknown-name")
        return dataclasses.replace(self, **change, eval_lengths=(), eval_at=())


GENERATORS: dict[str, type[SyntheticOptions]] = {}
T = TypeVar("T", bound=type[SyntheticOptions])


def register_generator(name: str) -> Callable[[T], T]:
    """Name a generator; a decorator of its options.

    Args:
        name: the task's name, a word.

    Raises:
        UserError: the name is taken or not a word, or the class is not a frozen dataclass derived from
            `SyntheticOptions`.
    """
    check_name("generator", name)

    def register(options: T) -> T:
        if not has_own_fields(options, SyntheticOptions):
            raise UserError(
                f"generator {name!r}: found {options!r}; wanted a class with @dataclass(frozen=True) and base "
                "SyntheticOptions",
                "incomplete",
            )
        if name in GENERATORS:
            raise UserError(
                f"generator {name!r}: registered already, by {GENERATORS[name].__qualname__}; choose another name",
                "already-exists",
            )
        options.name, options.what = name, f"task {name!r}"
        GENERATORS[name] = options
        return options

    return register


def find_generator(name: str) -> type[SyntheticOptions]:
    """Return the options class of a generator.

    Raises:
        UserError: no generator has this name; the message names near matches.
    """
    if not isinstance(name, str) or name not in GENERATORS:
        raise UserError(unknown_key_message("task", name, GENERATORS, "generator of examples"), "unknown-name")
    return GENERATORS[name]


def generate(
    options: SyntheticOptions, count: int, seed: int = 0, *, start: int = 0, stream: int = TRAINING
) -> Examples:
    """Return examples start to start + count - 1 of a seed.

    An example depends on the options, the seed, the stream and its index only: not on count, start, platform or
    version of numpy. Training with a seed takes the examples of stream 0 in order.

    Args:
        options: an instance of a generator's options, e.g. `MQAROptions(length=128, num_pairs=8)`.
        count: number of examples.
        seed: 0 to 2^64 - 1.
        start: index of the first example.
        stream: 0 for training, 1 for validation.

    Raises:
        UserError: a number is out of range.

    Example:
        >>> from hgrn2.tasks import ParityOptions, generate
        >>> inputs, targets = generate(ParityOptions(length=8), 100, seed=0)
        >>> inputs.shape, targets.dtype
        ((100, 8), dtype('int64'))
    """
    for name, value, limit in (("count", count, _SEEDS), ("seed", seed, _SEEDS), ("start", start, _SEEDS)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
            raise UserError(f"generate: {name} is {value!r}; wanted a whole number, 0 to 2^64 - 1")
    inputs = np.empty((count, options.length), np.int64)
    targets = np.empty_like(inputs)
    at = 0
    for block in _blocks(options, seed, start, count, stream):
        end = at + len(block.inputs)
        inputs[at:end], targets[at:end] = block
        at = end
    return Examples(inputs, targets)


def block_size(options: SyntheticOptions) -> int:
    """Return the number of examples that are drawn together; it follows from the length."""
    return max(1, min(_BLOCK_EXAMPLES, _BLOCK_TOKENS // options.length))


def draw_block(options: SyntheticOptions, seed: int, block: int, stream: int) -> Examples:
    """Return one block of examples, beginning with example block * block_size."""
    return options.draw(Draws(seed, block, stream, block_size(options)))


def _blocks(options: SyntheticOptions, seed: int, start: int, count: int, stream: int) -> Iterator[Examples]:
    size, end = block_size(options), start + count
    for block in range(start // size, -(-end // size)):
        low, high = max(start - block * size, 0), min(end - block * size, size)
        found = draw_block(options, seed, block, stream)
        yield Examples(found.inputs[low:high], found.targets[low:high])


def show(options: SyntheticOptions, examples: Examples, width: int = 100) -> str:
    """Return examples as text for people: inputs in words, and below them the targets, or "." where none counts.

    Args:
        options: the options that the examples were generated with.
        examples: the examples.
        width: columns of a line.
    """
    shown = []
    for inputs, targets in zip(*examples, strict=True):
        above = [options.word(int(token)) for token in inputs]
        below = ["." if token == IGNORE else options.word(int(token)) for token in targets]
        columns = [max(len(a), len(b)) for a, b in zip(above, below, strict=True)]
        at, lines = 0, []
        while at < len(columns):
            end, used = at, 0
            while end < len(columns) and (end == at or used + columns[end] + 1 <= width):
                used += columns[end] + 1
                end += 1
            for words in (above, below):
                line = " ".join(word.rjust(n) for word, n in zip(words[at:end], columns[at:end], strict=True))
                lines.append(line.rstrip())
            at = end
        shown.append("\n".join(lines))
    return "\n\n".join(shown)
