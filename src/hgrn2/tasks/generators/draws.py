"""Random numbers that are the same on every platform and in every version of numpy, for many examples at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# bits of a sort key that hold the value; the rest is random
_VALUE_BITS = 20
_VALUES = np.uint64(2**_VALUE_BITS - 1)


class Draws:
    """Random numbers for one block of examples, from the words of Philox-4x64 (a counter-based bit generator).

    Only raw words are taken from numpy, because its distributions may change between versions.

    Args:
        seed: 0 to 2^64 - 1.
        block: index of the block.
        stream: independent stream of the same seed, e.g. one for training and one for validation.
        num_rows: number of examples of the block, the first axis of most results.
    """

    def __init__(self, seed: int, block: int, stream: int, num_rows: int) -> None:
        key, counter = np.array([seed, block], np.uint64), np.array([0, 0, 0, stream], np.uint64)
        self._bits = np.random.Philox(key=key, counter=counter)
        self.num_rows = num_rows

    def words(self, size: int) -> NDArray[np.uint64]:
        """Return [size] random words of 64 bits."""
        return np.asarray(self._bits.random_raw(size), np.uint64)

    def integers(self, shape: int | Sequence[int], high: int) -> Ints:
        """Return uniform integers in [0, high); a probability errs by less than 2^-32.

        Args:
            shape: shape of the result.
            high: 1 to 2^31.
        """
        size = int(np.prod(shape))
        # little-endian, so that halves of a word have the same order everywhere
        halves = self.words((size + 1) // 2).astype("<u8", copy=False).view("<u4")[:size]
        scaled = halves.astype(np.uint64)
        scaled *= np.uint64(high)
        scaled >>= np.uint64(32)
        return scaled.view(np.int64).reshape(shape)

    def columns(self, num_columns: int, high: int) -> Ints:
        """Return uniform integers in [0, high), [num_rows, num_columns]."""
        return self.integers((self.num_rows, num_columns), high)

    def below(self, highs: Ints) -> Ints:
        """Return one uniform integer in [0, highs[i]) for each row, [num_rows]; highs are 1 to 2^31."""
        scaled = (self.words(self.num_rows) >> np.uint64(32)) * highs.astype(np.uint64)
        return (scaled >> np.uint64(32)).view(np.int64)

    def shuffled(self, values: Ints) -> Ints:
        """Return the values in random order within each row.

        Args:
            values: [num_rows, k], distinct within a row, 0 to 2^20 - 1.
        """
        keys = self.words(values.size).reshape(values.shape) & ~_VALUES
        keys |= values.view(np.uint64)
        keys.sort(axis=1)
        return (keys & _VALUES).view(np.int64)

    def subset(self, k: int, high: int) -> Ints:
        """Return uniform subsets of k of the integers in [0, high), [num_rows, k], in no particular order.

        Args:
            k: at most high.
            high: at most 2^20.
        """
        if k * k > 16 * high:
            return self.shuffled(np.broadcast_to(np.arange(high), (self.num_rows, high)).copy())[:, :k]
        # Floyd's algorithm (Bentley and Floyd 1987): a hit takes the newest candidate, which cannot be taken yet
        found = np.empty((k, self.num_rows), np.int64)
        for i in range(k):
            newest = high - k + i
            drawn = self.integers(self.num_rows, newest + 1)
            found[i] = np.where((found[:i] == drawn).any(axis=0), newest, drawn)
        return np.ascontiguousarray(found.T)

    def distinct(self, k: int, high: int) -> Ints:
        """Return k distinct uniform integers in [0, high), [num_rows, k], in random order; limits as for `subset`."""
        return self.shuffled(self.subset(k, high))

    def weighted(self, k: int, weights: NDArray[np.floating]) -> Ints:
        """Return k distinct indices of weights, [num_rows, k], drawn one after the other without replacement.

        Each is drawn with probability proportional to its weight among those left. Exponential variates divided by
        the weights are in this order (Efraimidis and Spirakis 2006). They are compared by 32 bits of their mantissa,
        which the last bit of a platform's logarithm practically never changes.

        Args:
            k: at most the number of weights.
            weights: [m], positive, m at most 2^20.
        """
        shape = (self.num_rows, len(weights))
        uniform = ((self.words(shape[0] * shape[1]) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        # bits of positive floats are ordered as the floats are, and the low ones make room for the index
        keys = (np.log(uniform).reshape(shape) / -weights).view(np.uint64) & ~_VALUES
        keys |= np.arange(len(weights), dtype=np.uint64)
        keys.sort(axis=1)
        return (keys[:, :k] & _VALUES).view(np.int64)
