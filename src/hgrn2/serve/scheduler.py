"""Choose the prompts to read next, and how much of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from hgrn2.serve.requests import Prompt


class Scheduler:
    """Queue of prompts, and shares of the tokens that one step of the engine may read.

    Each step of the engine reads at most `budget` tokens of prompts and then decodes one token of every running
    continuation. So prompts never hold up decoding for longer than `budget` tokens take, and decoding never holds up
    prompts. Prompts are admitted in the order of arrival; those admitted share the budget equally, so that a short
    prompt does not wait for the end of a long one.

    Args:
        budget: tokens of prompts read in one step.

    Attributes:
        waiting: prompts without a row, in the order of arrival.
        reading: prompts with a row that are not read to the end.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.waiting: deque[Prompt] = deque()
        self.reading: list[Prompt] = []

    def plan(self) -> list[tuple[Prompt, int]]:
        """Return the prompts to read in this step, and how many tokens of each; never across a wanted snapshot."""
        shares = fair_shares([_until_stop(prompt) for prompt in self.reading], self.budget)
        return [(prompt, share) for prompt, share in zip(self.reading, shares, strict=True) if share]


def fair_shares(wanted: Sequence[int], budget: int) -> list[int]:
    """Share a budget equally; what one does not need goes to the others, and a remainder to the first.

    Args:
        wanted: most that each can take.
        budget: the sum of the shares, unless less is wanted.

    Example:
        >>> fair_shares([3, 100, 100], 50)
        [3, 24, 23]
    """
    shares = [0] * len(wanted)
    left = budget
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    for place, i in enumerate(order):
        # rounded up for the earlier of those that want more
        shares[i] = min(wanted[i], -(-left // (len(order) - place)))
        left -= shares[i]
    return shares


def _until_stop(prompt: Prompt) -> int:
    stop = next((stop for stop in prompt.stops if stop > prompt.num_read), None)
    return prompt.num_left if stop is None else min(stop - prompt.num_read, prompt.num_left)
