"""Which backend runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import warnings

import torch

BACKENDS = ("auto", "reference", "chunked", "triton", "cuda")
OLDEST_TRITON = (3, 6)
# what matrix units take at least, and what fits a multiprocessor
NARROWEST, WIDEST = 16, 256
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_CAPABILITY = (9, 0)


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


def triton_runs(*dtypes: torch.dtype) -> bool:
    """Whether Triton is there, and its kernels take these dtypes, if any."""
    return _TRITON_PROBLEM is None and all(dtype in TRITON_DTYPES for dtype in dtypes)


def resolve_backend(
    backend: str, device: torch.device, dtype: torch.dtype, k_width: int, v_width: int, plain: bool = True
) -> str:
    """The backend that a request for `backend` means.

    Args:
        backend: "auto", "reference", "chunked", "triton" or "cuda".
        device: where the inputs are.
        dtype: of the inputs.
        k_width: K.
        v_width: V.
        plain: what the CUDA kernels can launch: a scan from pre-activations of fewer than 65,536 sequences.

    Returns:
        "reference", "chunked", "triton" or "cuda".

    Raises:
        ValueError: an unknown name, or kernels that cannot run, with the reason.
    """
    check_backend(backend)
    if backend in ("reference", "chunked"):
        return backend
    if backend == "auto" and device.type != "cuda":
        return "chunked"
    unsuitable = _unsuitable(device, dtype, k_width, v_width) or _TRITON_PROBLEM
    too_special = _unsuitable_for_cuda(device, dtype, k_width, v_width, plain)
    # the backward pass of float16 is Triton's
    if dtype == torch.float16:
        too_special = too_special or _TRITON_PROBLEM
    if (backend == "triton" and unsuitable) or (backend == "cuda" and too_special):
        reason = unsuitable if backend == "triton" else too_special
        raise ValueError(f"backend {backend!r} cannot run: {reason}; use 'auto' or 'chunked'")
    if backend == "triton":
        return "triton"
    if not too_special:
        return "cuda"
    if unsuitable and unsuitable == _TRITON_PROBLEM:
        _warn_once(
            f"{_TRITON_PROBLEM}: what has no other kernel runs as plain torch, which is several times slower on a GPU"
        )
    return "chunked" if unsuitable else "triton"


def _unsuitable(device: torch.device, dtype: torch.dtype, k_width: int, v_width: int) -> str | None:
    """Why the kernels cannot take such inputs."""
    if device.type != "cuda" and not (_INTERPRETED and device.type == "cpu"):
        return f"the inputs are on {device}, and its kernels need a GPU"
    if torch.version.hip:
        return "its kernels are for GPUs of NVIDIA"
    if dtype not in TRITON_DTYPES:
        return f"its kernels do not take {dtype}"
    if min(k_width, v_width) < NARROWEST or max(k_width, v_width) > WIDEST:
        return f"K is {k_width} and V {v_width}, and its kernels take {NARROWEST} to {WIDEST}"
    return None


def _unsuitable_for_cuda(
    device: torch.device, dtype: torch.dtype, k_width: int, v_width: int, plain: bool
) -> str | None:
    """Why the kernels in CUDA cannot take such inputs."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the inputs are on {device}, and its kernels need a GPU of NVIDIA"
    if dtype not in CUDA_DTYPES:
        return f"its kernels do not take {dtype}"
    if (k_width, v_width) != (128, 128):
        return f"K is {k_width} and V {v_width}, and its kernels are for 128"
    if not plain:
        return "its kernels take no key of its own, and fewer than 65,536 sequences"
    return _device_problem(device.index or 0)


@torch.compiler.assume_constant_result
def _device_problem(index: int) -> str | None:
    """Why nothing can be compiled for a device."""
    if index not in _DEVICE_PROBLEMS:
        from hgrn2.ops.cuda import compiler

        if torch.cuda.get_device_capability(index) != CUDA_CAPABILITY:
            wanted = ".".join(map(str, CUDA_CAPABILITY))
            _DEVICE_PROBLEMS[index] = f"its kernels are for devices of compute capability {wanted}"
        else:
            _DEVICE_PROBLEMS[index] = compiler.problem()
    return _DEVICE_PROBLEMS[index]


_DEVICE_PROBLEMS: dict[int, str | None] = {}


def _warn_once(message: str) -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=4)
