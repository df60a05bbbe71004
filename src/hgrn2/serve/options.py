"""Options of the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hgrn2.constraints import Ge, Le, check_fields
from hgrn2.errors import UserError


@dataclass(frozen=True)
class EngineOptions:
    """Options of `Engine`.

    Attributes:
        max_batch: continuations decoded at once.
        max_readers: prompts read at once; each has a state beside those of max_batch.
        prefill_tokens: tokens of prompts read between two decode steps, over all prompts.
        context_limit: tokens of a text in a model with full attention, whose keys and values have this many places in
            each row; other models have no limit.
        prefix_bytes: bytes of the prefix cache on the device; 0 for none.
        vocab_size: number of ids that are drawn, for a tokenizer with fewer than the model; None for the model's.
        weights: "bfloat16" decodes and reads with a copy of the model in bfloat16 (states stay float32); "as-is" uses
            the model itself.
        cuda_graphs: replay decode steps as CUDA graphs, on a GPU.
        run_ahead: start a decode step before the tokens of the one before have reached the host, on a GPU.
        write_every: after how many tokens HGRN2 layers write their state while decoding (`hgrn2.serve.replay`); without
            CUDA graphs, and in plain torch so far.
        deterministic: logits and tokens equal to the last bit, whatever the batch, the chunks of the prompt and the
            prefix cache; on the CPU.
        speculate: most tokens drafted by look-up in the text, for greedy requests while few are running; needs
            deterministic, which makes the tokens equal to those without drafts.
    """

    max_batch: Annotated[int, Ge(1), Le(4096)] = 32
    max_readers: Annotated[int, Ge(1), Le(1024)] = 8
    prefill_tokens: Annotated[int, Ge(1)] = 2048
    context_limit: Annotated[int, Ge(1)] = 4096
    prefix_bytes: Annotated[int, Ge(0)] = 0
    vocab_size: Annotated[int | None, Ge(1)] = None
    weights: str = "as-is"
    cuda_graphs: bool = True
    run_ahead: bool = True
    write_every: Annotated[int, Ge(1), Le(64)] = 1
    deterministic: bool = False
    speculate: Annotated[int, Ge(0), Le(15)] = 0

    def __post_init__(self) -> None:
        check_fields(self, "engine")
        if self.weights not in ("as-is", "bfloat16"):
            raise UserError(f"engine: weights is {self.weights!r}; wanted 'as-is' or 'bfloat16'", "unknown-name")
        if self.write_every > 1 and self.deterministic:
            raise UserError(
                f"engine: write_every is {self.write_every}; wanted 1 beside deterministic=True: sums in another order "
                "round differently",
                "contradiction",
            )
        if self.speculate and not self.deterministic:
            raise UserError(
                f"engine: speculate is {self.speculate}; give deterministic=True, without which a draft could change "
                "the tokens",
                "contradiction",
            )
