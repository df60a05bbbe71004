"""Statistics of a trained model's gates on text, small enough for the run folder."""

from __future__ import annotations

import math
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.storage.staging import staged_file

GATES_NAME = "gates.npz"
_NUM_BINS = 50
_DAMAGED = "cannot read the gates (damaged, or no gates at all); remove it, and resuming the run measures anew"
# float32 cannot represent gates closer to 1, so smaller decays are indistinguishable from 0
_LEAST_DECAY = 2.0**-25


class GatedModel(Protocol):
    """A model that returns the values of its gates."""

    def gate_statistics(self, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> list[dict[str, Any]]:
        """Return for every recurrent layer its index, lower_bound [D], forget_gate [B, T, D] and state_norm."""
        ...


@dataclass(frozen=True)
class GateSummary:
    """Gates of the L recurrent layers with D channels each, measured on num_tokens tokens.

    Attributes:
        layer: [L], indices of the layers in the model.
        lower_bound: [L, D], in [0, 1).
        half_life_tokens: [L, D], tokens after which a channel has forgotten half of its content on average:
            log 2 / mean(-log f). Decays multiply, so logarithms are averaged.
        forget_gate_counts: [L, bins], histogram of f over tokens and channels.
        forget_gate_edges: [bins + 1], from 0 to 1.
        state_norm: [L], Frobenius norm of a head's final state, averaged over heads and sequences.
        num_tokens: number of tokens measured.
    """

    layer: np.ndarray
    lower_bound: np.ndarray
    half_life_tokens: np.ndarray
    forget_gate_counts: np.ndarray
    forget_gate_edges: np.ndarray
    state_norm: np.ndarray
    num_tokens: np.ndarray

    def save(self, run_dir: Path) -> Path:
        """Write gates.npz into the run folder atomically."""
        path = run_dir / GATES_NAME
        # numpy would append .npz to the temporary name
        with staged_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **asdict(self))
        return path

    @classmethod
    def load(cls, run_dir: Path) -> GateSummary:
        """Read gates.npz of a run folder.

        Raises:
            UserError: the file is missing or unreadable.
        """
        path = run_dir / GATES_NAME
        try:
            # numpy would treat any other file as a pickle
            with path.open("rb") as file:
                if file.read(2) != b"PK":
                    raise BadZipFile
                file.seek(0)
                with np.load(file) as arrays:
                    summary = cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except OSError as error:
            raise UserError(
                f"{path}: cannot read the gates ({error.strerror or error}); a run writes them when it ends",
                "not-found",
            ) from None
        except (ValueError, KeyError, EOFError, BadZipFile, NotImplementedError, zlib.error):
            raise UserError(f"{path}: {_DAMAGED}", "damaged") from None
        if not summary._is_consistent():
            raise UserError(f"{path}: {_DAMAGED}", "damaged")
        return summary

    def _is_consistent(self) -> bool:
        if any(array.dtype.kind not in "iuf" or not np.isfinite(array).all() for array in vars(self).values()):
            return False
        num_layers = self.layer.shape
        return (
            len(num_layers) == 1
            and num_layers[0] > 0
            and self.lower_bound.ndim == 2
            and self.lower_bound.size > 0
            and self.lower_bound.shape == self.half_life_tokens.shape
            and self.lower_bound.shape[:1] == self.state_norm.shape == num_layers
            and self.forget_gate_counts.shape == (*num_layers, self.forget_gate_edges.size - 1)
            and self.forget_gate_edges.ndim == 1
            and self.num_tokens.shape == ()
        )


@torch.no_grad()
def measure_gates(model: GatedModel, input_ids: Tensor, cu_seqlens: Tensor | None = None) -> GateSummary | None:
    """Run the model on some text and summarise its gates.

    Args:
        model: the model, in evaluation mode.
        input_ids: int64 [B, T], or packed [1, T].
        cu_seqlens: int32 [N + 1], boundaries of a packed batch.

    Returns:
        The summary; None if no layer has gates, or if they are not finite.
    """
    edges = np.linspace(0.0, 1.0, _NUM_BINS + 1)
    statistics = model.gate_statistics(input_ids, cu_seqlens=cu_seqlens)
    if not statistics:
        return None
    bounds, half_lives, counts = [], [], []
    for layer in statistics:
        gate = layer["forget_gate"].detach().double().cpu().flatten(0, 1)
        decay = -gate.clamp(min=torch.finfo(torch.float32).tiny).log()
        bounds.append(layer["lower_bound"].detach().float().cpu().numpy())
        half_lives.append((math.log(2) / decay.mean(0).clamp(min=_LEAST_DECAY)).numpy())
        counts.append(np.histogram(gate.numpy(), bins=edges)[0])
    summary = GateSummary(
        layer=np.array([layer["layer"] for layer in statistics]),
        lower_bound=np.stack(bounds),
        half_life_tokens=np.stack(half_lives),
        forget_gate_counts=np.stack(counts),
        forget_gate_edges=edges,
        state_norm=np.array([layer["state_norm"] for layer in statistics]),
        num_tokens=np.array(input_ids.numel()),
    )
    return summary if all(np.isfinite(array).all() for array in vars(summary).values()) else None
