"""Axis letters and annotations of tensors.

| letter | meaning |
| --- | --- |
| B | batch |
| T | time: tokens of a sequence, or of all packed sequences together |
| N | sequences: B, or the number of packed ones |
| D | model width, `hidden_size` |
| L | layers |
| H | heads of the mixer |
| K | gate and key width of a head, `expand_ratio`: the state expansion of the paper |
| V | value width of a head, D / H |
| C | chunk length |

Activations are [B, T, D] or, split in heads, [B, T, H, K]; a state is [N, H, K, V]. The aliases below annotate tensors
with their axes; `tests/axes.py` checks them while tests run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from torch import Tensor

from hgrn2.errors import UserError

BT = Annotated[Tensor, "B T"]
BTD = Annotated[Tensor, "B T D"]
BTHK = Annotated[Tensor, "B T H K"]
BTHV = Annotated[Tensor, "B T H V"]
BHK = Annotated[Tensor, "B H K"]
BHV = Annotated[Tensor, "B H V"]
BHKV = Annotated[Tensor, "B H K V"]
HK = Annotated[Tensor, "H K"]
LD = Annotated[Tensor, "L D"]
NHKV = Annotated[Tensor, "N H K V"]
# any leading axes
Rows = Annotated[Tensor, "*batch D"]


def describe(x: Any) -> str:
    """Return a short description of a value for an error message."""
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)} of {x.dtype}"
    if x is None or (isinstance(x, bool | int | float | complex | str) and len(repr(x)) < 40):
        return repr(x)
    kind = type(x).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def require_shape(name: str, x: Tensor, letters: str, wanted: Sequence[int]) -> None:
    """Raise a UserError unless x has the wanted shape.

    Args:
        name: the caller's name of the tensor.
        x: the tensor.
        letters: the axes, for the message, e.g. "B T H K".
        wanted: the size of each axis.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"{name} is {describe(x)}; wanted a tensor [{letters.replace(' ', ', ')}]")
    if tuple(x.shape) != tuple(wanted):
        sizes = ", ".join(f"{letter}={size}" for letter, size in zip(letters.split(), wanted, strict=True))
        raise UserError(f"{name} has shape {list(x.shape)}; wanted [{letters.replace(' ', ', ')}] with {sizes}")
