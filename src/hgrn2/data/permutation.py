"""A keyed random permutation of 0 .. size-1 that is computed, not stored."""

from __future__ import annotations

import hashlib

import numpy as np

_NUM_ROUNDS = 8


def keyed_integer(*key: int | str | bytes) -> int:
    """Return a 64-bit hash of the key, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


class Permutation:
    """A pseudo-random bijection on range(size) with O(1) memory and O(1) random access.

    An unbalanced Feistel network over the smallest power of two that holds size (Luby and Rackoff, 1988),
    with cycle walking: a value outside the range goes through the network again until it falls inside.

    Args:
        size: number of elements, at least 1.
        key: equal keys give equal orders.

    Example:
        >>> sorted(Permutation(5, key=1)(np.arange(5)).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, size: int, key: int):
        assert size >= 1, f"size must be at least 1, got {size}"
        self.size = size
        num_bits = max(2, (size - 1).bit_length())
        self._low_bits = num_bits // 2
        self._high_bits = num_bits - self._low_bits
        self._keys = [np.uint64(keyed_integer("feistel", key, i)) for i in range(_NUM_ROUNDS)]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Map int64 indices in [0, size) to their images, int64 of the same shape."""
        value = self._network(index.astype(np.uint64))
        while (outside := value >= self.size).any():
            value[outside] = self._network(value[outside])
        return value.astype(np.int64)

    def _network(self, value: np.ndarray) -> np.ndarray:
        low = value & np.uint64((1 << self._low_bits) - 1)
        high = value >> np.uint64(self._low_bits)
        for i, key in enumerate(self._keys):
            # each half in turn is xored with a function of the other, which is its own inverse
            if i % 2 == 0:
                low ^= _mix(high, key) >> np.uint64(64 - self._low_bits)
            else:
                high ^= _mix(low, key) >> np.uint64(64 - self._high_bits)
        return (high << np.uint64(self._low_bits)) | low


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """Scramble 64 bits: two multiply-and-shift rounds of murmur3's finaliser; arithmetic is modulo 2**64."""
    value = value ^ key
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    value = (value ^ (value >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ (value >> np.uint64(33))
