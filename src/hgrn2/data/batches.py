"""Training batches: random windows, packed so that documents do not see each other, or parallel streams.

The tokens form a circle: the last token of the last document predicts the end-of-text token of the first. So a corpus
of N tokens has exactly N targets, and each is a target once an epoch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hgrn2.data.permutation import Permutation, keyed_integer
from hgrn2.data.tokens import TokenDataset
from hgrn2.errors import UserError
from hgrn2.nn.loss import IGNORE


@dataclass(frozen=True)
class Batch:
    """Input tokens and their targets, in one of two forms.

    Plain: rows of equal length, one sequence each. Packed: B = 1, several concatenated sequences with boundaries
    cu_seqlens. In a packed batch of streams, carry_from and carry_to map sequences to the states carried from batch to
    batch, one state per stream:

        initial_state[n] = carried[carry_from[n]] if carry_from[n] >= 0 else 0    for the N sequences
        carried[b] = final_state[carry_to[b]]                                     for the streams

    Attributes:
        input_ids: int64 [B, T].
        targets: int64 [B, T], the token after each input; -100 for inputs without a target.
        cu_seqlens: int32 [N + 1], starts of the packed sequences and the end of the last; None in the plain form.
        state_reset: bool [num_streams], True if a stream restarts and its carried state must be zero; None if no
            state is carried. In the packed form carry_from already accounts for it.
        carry_from: int64 [N], the stream whose state a sequence starts from, or -1 for a zero state; None if no state
            is carried, and in the plain form, where row b is stream b.
        carry_to: int64 [num_streams], the sequence whose final state becomes the state of each stream; None whenever
            carry_from is None.
        continues: of a row split over ranks: for each piece, whether its first sequence began in an earlier one.
        passes: for each piece, whether that sequence does not end before the piece does.
        whole_cu_seqlens: bounds of the sequences of the whole row, which this batch is a piece of.
        num_text_bytes: bytes of the documents that end in this batch, for bits per byte; 0 in training batches.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    state_reset: torch.Tensor | None = None
    carry_from: torch.Tensor | None = None
    carry_to: torch.Tensor | None = None
    continues: tuple[bool, ...] = ()
    passes: tuple[bool, ...] = ()
    whole_cu_seqlens: torch.Tensor | None = None
    num_text_bytes: int = 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on a device."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, from which copies to a GPU are asynchronous."""
        return self._map(torch.Tensor.pin_memory)

    def pad_sequences(self) -> Batch:
        """Return a packed batch with empty sequences at its end, up to a power of two of them: few shapes then occur.

        The batch must carry no states.
        """
        if self.cu_seqlens is None:
            return self
        assert self.carry_from is None
        num_sequences = len(self.cu_seqlens) - 1
        missing = max(8, 1 << (num_sequences - 1).bit_length()) - num_sequences
        padded = torch.cat([self.cu_seqlens, self.cu_seqlens[-1:].expand(missing)])
        return replace(self, cu_seqlens=padded.pin_memory() if self.cu_seqlens.is_pinned() else padded)

    def piece(self, index: int, count: int) -> Batch:
        """Return a piece of a batch that carries no states; sequences may continue from piece to piece.

        Args:
            index: number of the piece.
            count: number of pieces, which divides T.
        """
        assert self.carry_from is None
        assert self.state_reset is None
        length = self.input_ids.shape[1] // count
        assert length * count == self.input_ids.shape[1]
        part = slice(index * length, (index + 1) * length)
        ids, targets = self.input_ids[:, part], self.targets[:, part]
        if self.cu_seqlens is None:
            continues = tuple(piece > 0 for piece in range(count))
            return replace(self, input_ids=ids, targets=targets, continues=continues, passes=continues)
        # empty sequences hold no token
        starts = self.cu_seqlens[:-1][self.cu_seqlens.diff() > 0]
        firsts = torch.arange(count) * length
        continues = ~torch.isin(firsts, starts)
        inside = torch.bucketize(firsts + length, starts) - torch.bucketize(firsts, starts, right=True)
        own = starts[(starts > part.start) & (starts < part.stop)] - part.start
        bounds = torch.cat([own.new_zeros(1), own, own.new_full((1,), length)])
        return replace(
            self, input_ids=ids, targets=targets, cu_seqlens=bounds, continues=tuple(continues.tolist()),
            passes=tuple((continues & (inside == 0)).tolist()), whole_cu_seqlens=self.cu_seqlens,
        )  # fmt: skip

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: function(value) for name, value in tensors.items()})


class _Batches(Iterator[Batch], ABC):
    """Endless batches; the batch at a position depends only on the arguments.

    Attributes:
        position: position of the next batch.
        num_windows: positions per epoch.
        step_size: positions per batch.
        num_streams: number of streams on all ranks; None if no state is carried.
    """

    num_windows: int
    step_size: int
    num_streams: int | None = None

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        reset_at_documents: bool = True,
    ):
        _check_sizes(batch_size, seq_len, rank, world_size)
        self.dataset = dataset
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.reset_at_documents = reset_at_documents
        self.position = 0
        self._cut()

    @abstractmethod
    def _cut(self) -> None:
        """Set num_windows, step_size and everything else derived from the arguments."""

    @abstractmethod
    def batch_at(self, position: int) -> Batch:
        """Return the batch at a position."""

    @property
    def epoch(self) -> float:
        """Number of epochs read so far, with the fraction of the current one."""
        return self.position / self.num_windows

    def __next__(self) -> Batch:
        batch = self.batch_at(self.position)
        self.position += self.step_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, with the data and settings it belongs to."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position; the caller restores the carried states.

        Raises:
            UserError: saved with other data, or another seq_len, seed or number of streams on all ranks.
        """
        for name, now in self._identity().items():
            if state.get(name) != now:
                raise UserError(
                    f"data position: saved with {name} {state.get(name)!r}, now it is {now!r}; resume with the "
                    "same data and settings",
                    "mismatch",
                )
        self.position = int(state["position"])

    def _identity(self) -> dict[str, Any]:
        data = self.dataset.fingerprint
        return {"seed": self.seed, "seq_len": self.seq_len, "num_streams": self.num_streams, "data": data}


class PackedBatches(_Batches):
    """Endless random batches; the position is one integer.

    Every epoch cuts the circle of tokens at a random phase into windows of seq_len inputs (the last is shorter) and
    visits them in a keyed random order. All ranks share one sequence of samples: batch i of rank r holds the
    batch_size samples from (i * world_size + r) * batch_size on. So batch i of all ranks together depends only on
    batch_size * world_size, and a position saved with one world_size can be loaded with another.

    Args:
        dataset: the tokens.
        batch_size: windows per batch on each rank.
        seq_len: inputs per window.
        seed: seed of the phase and the order.
        rank: rank of this process, 0 <= rank < world_size.
        world_size: number of processes.
        reset_at_documents: True gives packed batches, input_ids [1, batch_size * seq_len] with cu_seqlens at every
            window and document. False gives plain ones, [batch_size, seq_len], in which a document sees those before
            it in its window.

    Raises:
        UserError: the dataset is shorter than one window.

    Example:
        batches = PackedBatches(prepared.train, batch_size=8, seq_len=1024, seed=0)
        batch = next(batches)
    """

    def _cut(self) -> None:
        _check_length(self.dataset, self.seq_len + 1, f"one window of seq_len {self.seq_len}")
        self.num_windows = -(-self.dataset.num_tokens // self.seq_len)
        self.step_size = self.batch_size * self.world_size
        self._orders: dict[int, Permutation] = {}

    def batch_at(self, position: int) -> Batch:
        """Return the batch at a position, counted in samples consumed by all ranks."""
        first = position + self.rank * self.batch_size
        samples = np.arange(first, first + self.batch_size)
        windows = np.empty((self.batch_size, self.seq_len + 1), dtype=np.int64)
        num_targets = np.empty(self.batch_size, dtype=np.int64)
        for epoch in range(int(samples[0]) // self.num_windows, int(samples[-1]) // self.num_windows + 1):
            rows = np.flatnonzero(samples // self.num_windows == epoch)
            starts = self._order(epoch)(samples[rows] % self.num_windows) * self.seq_len
            num_targets[rows] = np.minimum(self.dataset.num_tokens - starts, self.seq_len)
            phase = _phase(self.dataset, self.seed, epoch)
            for row, start in zip(rows, starts, strict=True):
                _copy_circular(self.dataset, windows[row], phase + int(start))
        inputs, targets = _inputs_and_targets(windows, num_targets)
        if not self.reset_at_documents:
            return Batch(torch.from_numpy(inputs), torch.from_numpy(targets))
        return Batch(
            torch.from_numpy(inputs.reshape(1, -1)),
            torch.from_numpy(targets.reshape(1, -1)),
            cu_seqlens=torch.from_numpy(_cu_seqlens(inputs, self.dataset.eot_id)),
        )

    def _order(self, epoch: int) -> Permutation:
        if epoch not in self._orders:
            # keep one: epochs are read in order
            self._orders = {epoch: Permutation(self.num_windows, keyed_integer("order", self.seed, epoch))}
        return self._orders[epoch]


class StreamBatches(_Batches):
    """Endless batches of parallel streams that carry state (truncated backpropagation through time).

    Every epoch cuts the circle of tokens, from a random phase on, into batch_size * world_size parts of equal length.
    Stream s reads part s in order, seq_len tokens per batch, and all streams restart with the next epoch. Rank r has
    the batch_size streams from r * batch_size on. The last window of an epoch is padded with tokens without targets.

    State must not cross document boundaries, so a batch is packed: window b is cut at its documents. Its first sequence
    continues stream b unless it starts a document or the stream is new; the others start from a zero state; the final
    state of the last one is carried on. `Batch.carry_from` and `Batch.carry_to` hold this as indices.

    Args:
        dataset: the tokens.
        batch_size: streams on each rank.
        seq_len: tokens per stream and batch.
        seed: seed of the phase.
        rank: rank of this process, 0 <= rank < world_size.
        world_size: number of processes.
        reset_at_documents: True gives packed batches. False gives plain ones, [batch_size, seq_len]: row b continues
            stream b across documents, and `Batch.state_reset` marks the rows that restart.

    Raises:
        UserError: the parts are shorter than one window.
    """

    def _cut(self) -> None:
        count = self.num_streams = self.batch_size * self.world_size
        _check_length(self.dataset, count * self.seq_len, f"{count} streams of seq_len {self.seq_len}")
        bounds = np.arange(count + 1) * self.dataset.num_tokens // count
        mine = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        self._starts, self._stops = bounds[:-1][mine], bounds[1:][mine]
        # equal on all ranks, so that they stay in step
        self.num_windows = -(-int(np.diff(bounds).max()) // self.seq_len)
        self.step_size = 1

    def batch_at(self, position: int) -> Batch:
        """Return the batch at a position, counted in batches."""
        epoch, window = divmod(position, self.num_windows)
        phase = _phase(self.dataset, self.seed, epoch)
        starts = self._starts + window * self.seq_len
        windows = np.empty((self.batch_size, self.seq_len + 1), dtype=np.int64)
        for row, start in zip(windows, starts, strict=True):
            _copy_circular(self.dataset, row, phase + int(start))
        inputs, targets = _inputs_and_targets(windows, np.clip(self._stops - starts, 0, self.seq_len))
        fresh = np.full(self.batch_size, window == 0)
        if not self.reset_at_documents:
            return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), state_reset=torch.from_numpy(fresh))
        return pack_streams(list(inputs), list(targets), np.arange(self.batch_size), fresh, self.dataset.eot_id)


def pack_streams(
    inputs: list[np.ndarray], targets: list[np.ndarray], streams: np.ndarray, fresh: np.ndarray, eot_id: int
) -> Batch:
    """Pack the next windows of several streams into one batch, cut at their documents.

    Args:
        inputs: input ids of each window, int64 [T_i], T_i >= 1.
        targets: targets of each window, int64 [T_i].
        streams: int [num_windows], the stream of each window, ascending.
        fresh: bool [num_streams], the streams that restart. The state of a stream without a window is arbitrary.
        eot_id: the token that starts a document.
    """
    flat = np.concatenate(inputs)
    lengths = np.array([len(row) for row in inputs])
    row_starts = np.concatenate([[0], np.cumsum(lengths)])
    cuts = flat == eot_id
    starts_document = cuts[row_starts[:-1]]
    cuts[row_starts[:-1]] = True
    sequence_starts = np.flatnonzero(cuts)
    first_sequences = np.searchsorted(sequence_starts, row_starts)
    carry_from = np.full(len(sequence_starts), -1, dtype=np.int64)
    carry_from[first_sequences[:-1]] = np.where(starts_document | fresh[streams], -1, streams)
    carry_to = np.zeros(len(fresh), dtype=np.int64)
    carry_to[streams] = first_sequences[1:] - 1
    return Batch(
        torch.from_numpy(flat[None]),
        torch.from_numpy(np.concatenate(targets)[None]),
        cu_seqlens=torch.from_numpy(np.append(sequence_starts, len(flat)).astype(np.int32)),
        state_reset=torch.from_numpy(fresh),
        carry_from=torch.from_numpy(carry_from),
        carry_to=torch.from_numpy(carry_to),
    )


def _inputs_and_targets(windows: np.ndarray, num_targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split windows [B, T + 1] into inputs and targets [B, T]; only the first num_targets [B] of a row are kept."""
    inputs = windows[:, :-1].copy()
    targets = windows[:, 1:].copy()
    targets[np.arange(targets.shape[1]) >= num_targets[:, None]] = IGNORE
    return inputs, targets


def _cu_seqlens(inputs: np.ndarray, eot_id: int) -> np.ndarray:
    cuts = inputs == eot_id
    cuts[:, 0] = True
    return np.append(np.flatnonzero(cuts), inputs.size).astype(np.int32)


def _copy_circular(dataset: TokenDataset, out: np.ndarray, start: int) -> None:
    while len(out):
        start %= dataset.num_tokens
        size = min(len(out), dataset.num_tokens - start)
        dataset.copy_into(out[:size], start)
        out, start = out[size:], start + size


def _phase(dataset: TokenDataset, seed: int, epoch: int) -> int:
    return keyed_integer("phase", seed, epoch) % dataset.num_tokens


def _check_sizes(batch_size: int, seq_len: int, rank: int, world_size: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise UserError(f"batch_size ({batch_size}) and seq_len ({seq_len}) must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is outside world_size {world_size}")


def _check_length(dataset: TokenDataset, needed: int, what: str) -> None:
    if dataset.num_tokens < needed:
        raise UserError(
            f"{dataset.directory}: the data has {dataset.num_tokens:,} tokens, but {what} needs {needed:,}; "
            "use a shorter seq_len, a smaller batch_size or more data",
            "contradiction",
        )
