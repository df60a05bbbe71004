"""Find the installed Triton, if any, without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

OLDEST = (3, 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def find_problem() -> str | None:
    """Return why the installed Triton, if any, cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if found < OLDEST:
            return f"Triton is {version}; wanted {'.'.join(map(str, OLDEST))} or newer"
        return None
    return None


# looked up once: what is installed does not change, and torch.compile can read a constant
PROBLEM = find_problem()
# Triton's interpreter runs kernels on the CPU, slowly, for tests
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_runs(*dtypes: torch.dtype) -> bool:
    """Return whether a usable Triton is installed whose kernels support these dtypes."""
    return PROBLEM is None and all(dtype in DTYPES for dtype in dtypes)
