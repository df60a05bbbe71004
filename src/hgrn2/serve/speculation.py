"""Greedy decoding with drafts: several tokens of one text verified in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.serve.lookup import Lookup
from hgrn2.serve.requests import Running
from hgrn2.serve.sampling import SamplingRows, features_of
from hgrn2.serve.tiles import TILE, TiledReader

# running continuations up to which drafts are verified, one continuation at a time
_FEW = 4


class Speculation:
    """Drafts of running continuations, by look-up in their texts.

    A pass computes the logits after the last token and after each draft without changing the state; then the state
    advances over the last token and the drafts that were right. Tiles make both equal to single steps in every bit.

    Args:
        tiles: runs the model.
        rows: the last tokens of the rows.
        most: most tokens of a draft.

    Attributes:
        num_drafted: tokens drafted so far.
        num_accepted: drafted tokens that were right.

    Raises:
        UserError: the state of a layer cannot go back.
    """

    def __init__(self, tiles: TiledReader, rows: SamplingRows, most: int):
        if not tiles.reads_sequences:
            raise UserError("engine: speculate needs a model of plain HGRN2 layers", "unsupported")
        self.tiles, self.rows, self.most = tiles, rows, min(most, TILE - 1)
        self.num_drafted = self.num_accepted = 0
        self._lookups: dict[tuple[int, int], Lookup] = {}

    def can_run(self, running: Sequence[Running]) -> bool:
        """Return whether few continuations run, all of them greedy without penalties, bias or log-probabilities."""
        needs = [features_of(r.request.sampling, r.request.logprobs is not None) for r in running]
        return len(running) <= _FEW and not any(any(features) for features in needs)

    def run(self, running: Running, row: int) -> list[tuple[int | None, Tensor | None]]:
        """Advance one continuation by at least one token.

        Args:
            running: the continuation.
            row: its row of the pool.

        Returns:
            The tokens, None where the logits are not finite, each with its logits [vocab] if the request wants them.
        """
        request = running.request
        lookup = self._lookups.get(running.key)
        if lookup is None:
            lookup = self._lookups[running.key] = Lookup(running.tokens)
        left = request.max_tokens - running.num_written - 1
        tokens = [running.tokens[-1], *lookup.draft(min(self.most, left))]
        logits, ring = self.tiles.verify(row, tokens)
        best = logits[:, : self.rows.vocab_size].max(-1)
        finite = best.values.isfinite().tolist()
        found = [token if ok else None for token, ok in zip(best.indices.tolist(), finite, strict=True)]
        right = 0
        while right < len(tokens) - 1 and found[right] == tokens[right + 1] and found[right] not in request.stop_ids:
            right += 1
        self.num_drafted += len(tokens) - 1
        self.num_accepted += right
        self.tiles.commit(row, ring, right + 1)
        running.num_read += right + 1
        self.rows.tokens[row] = found[right] or 0
        self.rows.number[row] += right + 1
        kept = found[: right + 1]
        lookup.extend([token for token in kept if token is not None])
        return [(token, logits[i].clone() if request.return_logits else None) for i, token in enumerate(kept)]

    def forget(self, running: Running) -> None:
        """Drop what is kept for a continuation that ended."""
        self._lookups.pop(running.key, None)
