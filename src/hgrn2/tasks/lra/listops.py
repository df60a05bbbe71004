"""ListOps as a classification: the value of a nested expression of 500 to 2,000 tokens."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from os import sched_getaffinity
from typing import Annotated, Any, ClassVar

import numpy as np

from hgrn2.constraints import Ge, Le
from hgrn2.data.lra.sequences import LabelledSequences
from hgrn2.errors import UserError
from hgrn2.tasks.generators.base import IGNORE, MAX_TOKENS, TRAINING, VALIDATION, Examples, block_size, draw_block
from hgrn2.tasks.generators.listops import WORDS, ListOpsOptions
from hgrn2.tasks.lra.base import LRAOptions, LRATask
from hgrn2.tasks.registry import register_task

# "=" and padding of the generator are left out
_NUM_TOKENS = WORDS.index("=")
_SEED = 0
# number of blocks from which several processes are faster
_MANY_BLOCKS = 64


@dataclass(frozen=True)
class ListOpsSequenceOptions(LRAOptions):
    """Options of ListOps; the defaults are Long Range Arena's: 96,000 and 2,000 expressions of 501 to 1,999 tokens."""

    what = "task 'lra-listops'"

    max_length: Annotated[int, Ge(5), Le(MAX_TOKENS)] = 1999
    """Tokens of the longest expression."""
    min_length: Annotated[int, Ge(1), Le(MAX_TOKENS)] = 501
    """Tokens of the shortest expression."""
    max_depth: Annotated[int, Ge(1), Le(100)] = 10
    """Depth of the deepest digits."""
    max_args: Annotated[int, Ge(2), Le(1000)] = 10
    """Largest number of arguments."""
    training_examples: Annotated[int, Ge(1), Le(10**7)] = 96_000
    """Expressions to train on."""
    test_examples: Annotated[int, Ge(1), Le(10**7)] = 2000
    """Expressions to validate on."""
    eval_lengths: tuple[int, ...] = ()
    """Longer expressions to validate on: 4000 means max_length + 1 to 4000 tokens, and the next more than 4000."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "eval_lengths", tuple(self.eval_lengths))
        if list(self.eval_lengths) != sorted({*self.eval_lengths}) or any(
            length <= self.max_length for length in self.eval_lengths
        ):
            raise UserError(
                f"{self.what}: eval_lengths is {list(self.eval_lengths)}; wanted rising lengths above max_length "
                f"{self.max_length}"
            )
        self.generator(self.min_length, self.max_length)

    def generator(self, min_length: int, max_length: int) -> ListOpsOptions:
        """Return the options of the generator for expressions of these lengths."""
        return ListOpsOptions(
            length=max_length + 1, min_length=min_length, max_depth=self.max_depth, max_args=self.max_args
        )


@register_task
class ListOpsSequenceTask(LRATask):
    """Compute the value, 0 to 9, of an expression such as [MAX 2 9 [MIN 4 7 ] 0 ]."""

    name = "lra-listops"
    Options: ClassVar[Any] = ListOpsSequenceOptions
    vocab_size = _NUM_TOKENS
    num_classes = 10

    @classmethod
    def read(cls, options: Any, split: str) -> LabelledSequences:
        """Generate the examples of a split."""
        is_train = split == "train"
        num = options.training_examples if is_train else options.test_examples
        own = options.generator(options.min_length, options.max_length)
        return _classified(own, num, TRAINING if is_train else VALIDATION)

    @classmethod
    def sample_text(cls, tokens: Any) -> str:
        """Return an expression."""
        return " ".join(WORDS[token] for token in tokens)

    def further_sets(self, options: Any) -> dict[str, LabelledSequences]:
        """Return expressions that are longer than those of training."""
        found, low = {}, options.max_length
        for length in options.eval_lengths:
            found[f"_beyond_{length}"] = _classified(
                options.generator(low + 1, length), min(500, options.test_examples), VALIDATION
            )
            low = length
        return found


def _classified(options: ListOpsOptions, num: int, stream: int) -> LabelledSequences:
    """Return examples of the generator with the value as the label; blocks are drawn by several processes."""
    blocks = range(-(-num // block_size(options)))
    arguments = zip(*((options, _SEED, block, stream) for block in blocks), strict=True)
    if len(blocks) < _MANY_BLOCKS:
        parts = list(map(_compact, *arguments))
    else:
        # spawned, since torch's threads do not survive a fork
        with ProcessPoolExecutor(min(len(sched_getaffinity(0)), len(blocks)), get_context("spawn")) as pool:
            parts = list(pool.map(_compact, *arguments, chunksize=8))
    inputs, lengths, labels = (np.concatenate(found)[:num] for found in zip(*parts, strict=True))
    names = tuple(map(str, range(10)))
    return LabelledSequences(inputs, lengths, labels, names)


def _compact(options: ListOpsOptions, seed: int, block: int, stream: int) -> tuple[Any, Any, Any]:
    """Return a block as inputs [N, T] uint8 without "=", lengths [N] and labels [N]."""
    found: Examples = draw_block(options, seed, block, stream)
    lengths = (found.targets != IGNORE).argmax(1)
    labels = found.targets[np.arange(len(lengths)), lengths]
    inputs = np.where(np.arange(options.length) < lengths[:, None], found.inputs, 0)[:, : options.length - 1]
    return inputs.astype(np.uint8), lengths.astype(np.int32), labels
