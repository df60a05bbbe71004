"""Find the installed Triton, if any, without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import torch

from hgrn2.errors import UserError

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


def choose_kernels(backend: str, device: torch.device, state_dtype: torch.dtype, *dtypes: torch.dtype) -> bool:
    """Return whether Triton kernels run an element-wise or selective scan.

    Args:
        backend: name of the backend; "auto" means "triton" where its kernels are compiled for a GPU.
        device: device of the inputs.
        state_dtype: dtype of the state.
        *dtypes: dtypes of the inputs, real or complex.

    Raises:
        UserError: backend is "triton" and its kernels cannot take the inputs.
    """
    if backend not in ("auto", "triton"):
        return False
    taken = (*DTYPES, torch.complex64)
    if device.type != "cuda" and not (IS_INTERPRETED and device.type in ("cpu", "meta")):
        reason, code = f"the inputs are on {device.type}, and its kernels need a GPU", "unsupported"
    elif torch.version.hip:
        reason, code = "its kernels are for NVIDIA GPUs", "unsupported"
    elif state_dtype not in (torch.float32, torch.complex64) or any(dtype not in taken for dtype in dtypes):
        reason, code = f"its kernels do not take {', '.join(map(str, (state_dtype, *dtypes)))}", "unsupported"
    elif PROBLEM is not None:
        reason, code = PROBLEM, "unavailable"
    else:
        # the interpreter is for tests
        return backend == "triton" or not IS_INTERPRETED
    if backend == "triton":
        raise UserError(f"backend 'triton' cannot run: {reason}; use 'auto'", code)
    return False
