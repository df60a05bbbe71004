"""Choose torch devices by name."""

from __future__ import annotations

import torch

from hgrn2.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the torch device with a name; "auto" is the first GPU, or the CPU.

    Raises:
        UserError: torch does not know the name, or the device does not exist.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    kind, _, index = name.partition(":")
    if kind in ("cuda", "gpu") and not num_gpus:
        raise UserError(f"device {name!r} cannot be used: no CUDA here; use cpu", "unavailable")
    wanted = "auto, cpu or cuda" if num_gpus else "auto or cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        hint = "did you mean cuda?" if kind == "gpu" else f"wanted {wanted}"
        raise UserError(f"device {name!r} is not known; {hint}", "unknown-name") from None
    if kind == "cuda" and index and int(index) >= num_gpus:
        raise UserError(
            f"device {name!r} cannot be used: the last GPU here is cuda:{num_gpus - 1}; use cuda", "unavailable"
        )
    try:
        if device.type == "meta" or (device.type == "cpu" and device.index):
            raise RuntimeError("meta tensors hold no values" if device.type == "meta" else "there is one CPU")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"device {name!r} cannot be used: {reason}; use {wanted}", "unavailable") from None
    return device
