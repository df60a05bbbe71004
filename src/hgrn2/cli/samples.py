"""Samples of text that a run writes while it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hgrn2.data.tokenizer import Tokenizer


def make_sampler(tokenizer: Tokenizer) -> Callable[[Any, str], str]:
    """Return a function that writes samples from a model and a prompt; seeded, so that a resumed run repeats them.

    Args:
        tokenizer: the tokenizer of the model.
    """
    from hgrn2.inference.writing import Sampling, Writer

    def sampler(model: Any, prompt: str) -> str:
        writer = Writer(model, tokenizer, Sampling(temperature=0.8, top_p=0.95, seed=0))
        return prompt + "".join(writer.write(prompt, 200))

    return sampler
