"""Read parts of several prompts in one pass, packed end to end."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from hgrn2.models import HGRN2LM
from hgrn2.nn.mixers.registry import find_mixer
from hgrn2.serve.pool import StatePool


class PackedPrefill:
    """Read parts of prompts with the model's own forward pass.

    Args:
        model: the model, in evaluation mode.
        pool: the states; a row that has read nothing holds zeros.
    """

    def __init__(self, model: HGRN2LM, pool: StatePool):
        self.model, self.pool = model, pool
        self.device = model.lm_head.weight.device
        self.can_pack = all(find_mixer(name).mixer.can_pack for name in model.config.layers or ())

    @torch.no_grad()
    def __call__(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
        """Read a part of each prompt.

        Args:
            parts: for each prompt its row of the pool, the number of tokens that the row has read, and the tokens to
                read, at least one.

        Returns:
            Logits [N, vocab] after the last token of each part.
        """
        if len(parts) > 1 and not self.can_pack:
            return torch.cat([self([part]) for part in parts])
        rows = [row for row, _, _ in parts]
        lengths = [len(tokens) for _, _, tokens in parts]
        ids = torch.tensor([[token for _, _, tokens in parts for token in tokens]], device=self.device)
        state = self.pool.read(rows, max(read for _, read, _ in parts))
        bounds = None
        if len(parts) > 1:
            bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.device)
        hidden, state = self.model.hidden_states(ids, state, bounds)
        self.pool.write(rows, state)
        last = torch.tensor([end - 1 for end in itertools.accumulate(lengths)], device=self.device)
        return self.model.lm_head(hidden[0].index_select(0, last))
