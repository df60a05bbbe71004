"""Which backend runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import warnings

import torch

BACKENDS = ("auto", "reference", "chunked", "triton")
OLDEST_TRITON = (3, 6)
# matrix units read blocks of a head whole
WIDEST = 256
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _triton_problem() -> str | None:
    """Why the Triton that is installed, if any, cannot be used; does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
        if found < OLDEST_TRITON:
            return f"Triton is {version}; wanted {'.'.join(map(str, OLDEST_TRITON))} or newer"
        return None
    return None


# looked up once: what is installed does not change, and torch.compile can read a constant
_TRITON_PROBLEM = _triton_problem()
# Triton's interpreter runs kernels on the CPU, slowly, for tests
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_warned = False


def check_backend(backend: str) -> None:
    """Raises a ValueError unless this is the name of a backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; wanted one of {', '.join(map(repr, BACKENDS))}")


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype, k_width: int, v_width: int) -> str:
    """The backend that a request for `backend` means.

    Args:
        backend: "auto", "reference", "chunked" or "triton".
        device: where the inputs are.
        dtype: of the inputs.
        k_width: K.
        v_width: V.

    Returns:
        "reference", "chunked" or "triton".

    Raises:
        ValueError: an unknown name, or "triton" where it cannot run, with the reason.
    """
    check_backend(backend)
    if backend in ("reference", "chunked"):
        return backend
    if backend == "auto" and device.type != "cuda":
        return "chunked"
    unsuitable = _unsuitable(device, dtype, k_width, v_width)
    if backend == "triton":
        if unsuitable or _TRITON_PROBLEM:
            raise ValueError(f"backend 'triton' cannot run: {unsuitable or _TRITON_PROBLEM}; use 'auto' or 'chunked'")
        return "triton"
    if unsuitable:
        return "chunked"
    if _TRITON_PROBLEM:
        _warn_once(f"{_TRITON_PROBLEM}: the operators run as plain torch, which is several times slower on a GPU")
        return "chunked"
    return "triton"


def _unsuitable(device: torch.device, dtype: torch.dtype, k_width: int, v_width: int) -> str | None:
    """Why the kernels cannot take such inputs."""
    if device.type != "cuda" and not (_INTERPRETED and device.type == "cpu"):
        return f"the inputs are on {device}, and its kernels need a GPU"
    if dtype not in TRITON_DTYPES:
        return f"its kernels do not take {dtype}"
    if max(k_width, v_width) > WIDEST:
        return f"K is {k_width} and V {v_width}, and its kernels take at most {WIDEST}"
    return None


def _warn_once(message: str) -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=4)
