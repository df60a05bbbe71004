"""Arguments of the kernels: each takes one structure by value, which begins with its pointers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

_STRIDES = ("batch", "row", "head")
_BEFORE = ("before_segments", "before_segment", "before_heads", "before_head")


def _pointers(names: Iterable[str]) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _longs(names: Iterable[str]) -> list[tuple[str, type]]:
    return [(name, ctypes.c_longlong) for name in names]


def _ints(names: Iterable[str]) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int) for name in names]


def _strides(names: Iterable[str]) -> list[tuple[str, type]]:
    return _longs(f"{name}_{axis}" for name in names for axis in _STRIDES)


class ForwardArguments(ctypes.Structure):
    """Argument of the kernels of forward.cu, with the fields of the struct in forward.cuh."""

    POINTERS = (
        "q", "f", "v", "bound", "spans", "num_spans", "y", "initial", "final", "before", "update", "decay", "coarse",
        "kept",
    )  # fmt: skip
    _fields_ = (
        *_pointers(POINTERS), *_strides("qfv"), *_longs(["length"]),
        *_ints(["heads", "first_head", "first_chunk", "end_chunk", "segments", "segment_chunks", *_BEFORE]),
        *_ints(["coarse_chunks", "pieces", "kept_chunks", "reverse"]), ("scale", ctypes.c_float),
    )  # fmt: skip


class BackwardArguments(ctypes.Structure):
    """Argument of the kernels of backward.cu and backward_exact.cu, with the fields of the struct in gradients.cuh."""

    POINTERS = (
        "q", "f", "v", "dy", "bound", "spans", "num_spans", "states", "d_states", "dq", "df", "dv", "d_bound",
        "fallback", "d_final", "d_initial", "before", "after",
    )  # fmt: skip
    _fields_ = (
        *_pointers(POINTERS), *_strides(["q", "f", "v", "dy"]), *_longs(["length"]),
        *_ints(["batches", "heads", "chunks", "first_head", "group", "first_chunk", "end_chunk", "segment_chunks"]),
        *_ints([*_BEFORE, "part_chunks", "reverse"]), ("scale", ctypes.c_float),
    )  # fmt: skip


class CarryArguments(ctypes.Structure):
    """Argument of the kernel of carry.cuh, with the fields of its struct."""

    _fields_ = (*_pointers(["update", "decay"]), *_ints(["segments", "back"]))


class BoundsArguments(ctypes.Structure):
    """Argument of the kernel of bounds.cuh, with the fields of its struct."""

    _fields_ = (*_pointers(["parts", "sum"]), *_longs(["rows"]), *_ints(["heads"]))


class PackedArguments(ctypes.Structure):
    """Argument of the kernel of packed.cuh, with the fields of its struct."""

    OUTPUTS = 3
    _fields_ = (
        *_pointers(["cu_seqlens", "spans", "num_spans"]), ("outputs", ctypes.c_void_p * OUTPUTS), *_longs(["length"]),
        *_ints(["sequences", "most", "heads", "wide", "reverse"]),
    )  # fmt: skip
