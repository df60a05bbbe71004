"""Backends of the scans, and their registry."""

from hgrn2.ops.backends.base import (
    Backend,
    auto_order,
    backend_names,
    check_backend,
    choose,
    find,
    register,
    registered,
    resolve_backend,
    set_auto_order,
    unregister,
)
from hgrn2.ops.backends.chunked.scan import ChunkedBackend
from hgrn2.ops.backends.cuda import CudaBackend
from hgrn2.ops.backends.narrow import NarrowBackend
from hgrn2.ops.backends.reference import ReferenceBackend
from hgrn2.ops.backends.triton import TritonBackend
from hgrn2.ops.triton.installed import IS_INTERPRETED, triton_runs

__all__ = [
    "Backend",
    "auto_order",
    "backend_names",
    "check_backend",
    "choose",
    "find",
    "register",
    "registered",
    "resolve_backend",
    "set_auto_order",
    "triton_runs",
    "unregister",
]

for _backend in (ReferenceBackend(), ChunkedBackend(), TritonBackend(), NarrowBackend(), CudaBackend()):
    register(_backend)
# "auto" never chooses the reference or kernels in an interpreter, which are for tests, nor "narrow", which no GPU has
# run yet
set_auto_order("cuda", *(() if IS_INTERPRETED else ("triton",)), "chunked")
