"""Projections that expand D channels to n D with fewer parameters than a dense matrix (arXiv 2404.07904, section 3)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from hgrn2.nn.parameters import InitialValues
from hgrn2.shapes import BTD

ExpansionKind = Literal[
    "dense", "low-rank", "group-linear", "group-linear-interaction", "khatri-rao", "kronecker"
]  # fmt: skip


class Expansion(nn.Module):
    """A projection of D channels to n rows of D channels, by a matrix of a given structure.

    | kind | matrix [n D, D] | parameters |
    | --- | --- | --- |
    | dense | any | n D^2 |
    | low-rank | U V, of rank r = max(1, D / (n + 1)) rounded down | (n + 1) D r |
    | group-linear | block-diagonal: row i is computed from the i-th of n groups of channels | D^2 |
    | group-linear-interaction | group-linear, then channels are shuffled: a row has some of every group | D^2 |
    | khatri-rao | column by column a (x) b, with a [n, D] and b [D, D] | D^2 + n D |
    | kronecker | A (x) B, with A [n P, P], B [D / P, D / P], P the largest divisor <= sqrt(D) | n P^2 + (D / P)^2 |

    The paper names these structures and compares them with the outer product; sizes, the place of the shuffle and the
    rank are choices made here, so that all but "dense" have about D^2 parameters or fewer.

    Args:
        kind: the structure.
        hidden_size: D; a multiple of n for both group-linear kinds.
        ratio: n.
        bias: whether every channel of the result has a bias.
    """

    def __init__(self, kind: str, hidden_size: int, ratio: int, bias: bool):
        super().__init__()
        self.kind, self.hidden_size, self.ratio = kind, hidden_size, ratio
        width = hidden_size
        self.bias = nn.Parameter(torch.zeros(ratio, width)) if bias else None
        self.factor = nn.Parameter(torch.ones(ratio, width)) if kind == "khatri-rao" else None
        if kind == "dense":
            shapes = [(width, ratio * width)]
        elif kind == "low-rank":
            rank = max(1, width // (ratio + 1))
            shapes = [(width, rank), (rank, ratio * width)]
        elif kind == "khatri-rao":
            shapes = [(width, width)]
        elif kind == "kronecker":
            part = max(p for p in range(1, math.isqrt(width) + 1) if width % p == 0)
            shapes = [(part, ratio * part), (width // part, width // part)]
        else:
            shapes = [(width // ratio, width)] * ratio
        self.parts = nn.ModuleList(nn.Linear(*shape, bias=False) for shape in shapes)

    @property
    def _matrices(self) -> list[nn.Linear]:
        return list(self.parts)  # pyright: ignore[reportReturnType]

    def forward(self, x: BTD) -> torch.Tensor:
        """Return [B, T, n, D] from x [B, T, D]."""
        n, parts = self.ratio, self._matrices
        if self.kind == "dense":
            y = parts[0](x).unflatten(-1, (n, -1))
        elif self.kind == "low-rank":
            y = parts[1](parts[0](x)).unflatten(-1, (n, -1))
        elif self.kind == "khatri-rao":
            assert self.factor is not None
            y = parts[0](x.unsqueeze(-2) * self.factor.to(x.dtype))
        elif self.kind == "kronecker":
            grid = parts[1](x.unflatten(-1, (parts[0].in_features, -1)))
            y = parts[0](grid.transpose(-1, -2)).transpose(-1, -2).unflatten(-2, (n, -1)).flatten(-2)
        else:
            y = torch.stack([part(group) for part, group in zip(parts, x.chunk(n, -1), strict=True)], -2)
            if self.kind == "group-linear-interaction":
                # channel j of group i moves to place n j + i of all n D
                y = y.transpose(-1, -2).flatten(-2).unflatten(-1, (n, -1))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def reset_parameters(self, init: InitialValues) -> None:
        """Draw the matrices, so that each entry of the whole has a standard deviation of about `init.std`."""
        first, *others = self._matrices
        init.draw(first, *([] if self.kind in ("low-rank", "kronecker") else others))
        if self.kind in ("low-rank", "kronecker"):
            scale = others[0].in_features ** -0.5 if self.kind == "low-rank" else 1.0
            nn.init.normal_(others[0].weight, 0.0, scale, generator=init.generator)
        if self.factor is not None:
            # equal rows would stay equal
            nn.init.normal_(self.factor, 0.0, 1.0, generator=init.generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def flops(self) -> int:
        """Return the operations per token beyond one product and one sum per weight of the matrices."""
        counts = {"khatri-rao": [self.ratio]}
        if self.kind == "kronecker":
            # the first is applied to every column of x as a table, the second to every row
            counts = {"kronecker": [self._matrices[1].in_features, self._matrices[0].in_features]}
        times = counts.get(self.kind, [1] * len(self.parts))
        return sum(2 * part.weight.numel() * (n - 1) for part, n in zip(self._matrices, times, strict=True))

    def activation_bytes(self, low: int) -> int:
        """Return the bytes per token that are saved besides x and the result; `low` as in `Mixer.activation_bytes`."""
        between = {"khatri-rao": self.ratio * self.hidden_size, "kronecker": self.hidden_size}
        if self.kind == "low-rank":
            return low * self._matrices[0].out_features
        return low * between.get(self.kind, 0)
