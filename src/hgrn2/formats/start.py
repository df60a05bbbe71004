"""A start for recurrent layers from a Transformer: its weights around new mixers (XATL, arXiv 2404.02684)."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.formats import transformer
from hgrn2.formats.opening import ModelFolder, read_folder_config
from hgrn2.formats.tables import EMBEDDINGS, model_shapes
from hgrn2.models import HGRN2Config

# attention averages values of several tokens, which makes them smaller; measured in docs/log.md
_VALUE_FRACTION = 0.25

_LAYER = re.compile(r"model\.layers\.(\d+)\.attn\.(.+)")


@dataclass(frozen=True)
class TransformerStart:
    """A model whose recurrent mixers are new and whose other tensors are a Transformer's; read when they are asked for.

    | tensors | where they come from |
    | --- | --- |
    | embeddings, head, channel mixers, block norms, output projections | copied |
    | layers that keep their attention | copied |
    | q_proj, i_proj | copied from q and v with `copy_qv`, grouped v repeated to full width; otherwise as f_proj |
    | f_proj | normal, standard deviation `initializer_range` |
    | lower_bounds | 0: the bound of layer l is l / L, so that a token stays for longer the deeper the layer |
    | g_norm | a quarter of the size that the values of the layer's attention have, in all channels |

    A norm gives the mixer's outputs one size, whatever the new projections are; with the last row that is about the
    size the copied output projection knows.

    Attributes:
        source: the Transformer.
        config: ours, with recurrent layers.
        copy_qv: whether q and i come from the attention as well.
        seed: of the new tensors.
    """

    source: ModelFolder
    config: HGRN2Config
    copy_qv: bool = False
    seed: int = 0

    @property
    def path(self) -> Path:
        """The Transformer's folder."""
        return self.source.path

    @property
    def settings(self) -> dict[str, Any]:
        """The Transformer's config.json."""
        return self.source.settings

    @functools.cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Our tensors, in the order of the model, and their shapes."""
        return model_shapes(self.config)

    @property
    def names(self) -> list[str]:
        """Our tensors, in the order of the model."""
        return list(self.shapes)

    def spec(self, name: str) -> Tensor:
        """One of our tensors on the meta device: its shape, and the dtype that the Transformer has there."""
        like = self._layer_prefix(name)
        dtype = self.source.spec(self._origin(name) or (EMBEDDINGS if like is None else f"{like}o_proj.weight")).dtype
        return torch.empty(self.shapes[name], dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """One of our tensors, copied or new."""
        origin, spec = self._origin(name), self.spec(name)
        if origin is not None:
            found = self.source.read(origin)
            if found.shape == spec.shape:
                return found
            # a head of v serves a group of q's heads
            attn = self.source.config.attn
            assert attn is not None
            assert attn.num_kv_heads is not None
            heads = found.unflatten(0, (attn.num_kv_heads, -1))
            return heads.repeat_interleave(attn.num_heads // attn.num_kv_heads, 0).flatten(0, 1)
        if name.endswith("g_norm.weight"):
            return torch.full(spec.shape, _VALUE_FRACTION * self._value_size(name), dtype=spec.dtype)
        if name == "model.lower_bounds":
            return torch.zeros(spec.shape, dtype=spec.dtype)
        # each tensor has a stream of its own, so that it does not matter which are read and in what order
        generator = torch.Generator().manual_seed(self.seed * 2**24 + self.names.index(name))
        new = torch.empty(spec.shape).normal_(0, self.config.initializer_range, generator=generator)
        return new.to(spec.dtype)

    def _layer_prefix(self, name: str) -> str | None:
        """What the names of a mixer begin with, if it is the name of a recurrent layer's mixer."""
        found = _LAYER.fullmatch(name)
        attn = self.config.attn
        if found is None or (attn is not None and int(found[1]) in attn.layers):
            return None
        return name.removesuffix(found[2])

    def _origin(self, name: str) -> str | None:
        """The tensor of the Transformer's that is taken for one of ours; None for one that is new."""
        prefix = self._layer_prefix(name)
        if prefix is None:
            return name if name in self.source.places else None
        copied = {"o_proj.weight": "o_proj.weight"}
        if self.copy_qv:
            copied |= {"q_proj.weight": "q_proj.weight", "i_proj.weight": "v_proj.weight"}
        own = copied.get(name.removeprefix(prefix))
        return None if own is None else prefix + own

    def _value_size(self, name: str) -> float:
        """Root mean square of the attention's values, if the channels of its input were independent."""
        prefix = self._layer_prefix(name)
        assert prefix is not None
        gain = self.source.read(f"{prefix.removesuffix('attn.')}attn_norm.weight").float()
        square = (self.source.read(f"{prefix}v_proj.weight").float() * gain).square().sum(1)
        bias = f"{prefix}v_proj.bias"
        if bias in self.source.places:
            square = square + self.source.read(bias).float().square()
        return float(square.mean().sqrt())


def start_from_transformer(
    source: ModelFolder,
    *,
    keep_attention: Collection[int] = (),
    expand_ratio: int | None = None,
    copy_qv: bool = False,
    seed: int = 0,
) -> TransformerStart:
    """A model with recurrent layers in place of a Transformer's attention.

    Args:
        source: a Transformer, from `open_folder`, `attends` or not.
        keep_attention: layers that stay as they are; in them, the model computes what the Transformer does.
        expand_ratio: width of a head of the recurrent layers; None for that of the Transformer's heads.
        copy_qv: start q_proj from the attention's q and i_proj from its v.
        seed: of the new tensors.

    Raises:
        UserError: the source is no Transformer, the layers or the width do not go with it, or a layer is to be kept
            whose positions our attention does not have.
    """
    config = source.config
    if source.layout.name != transformer.NAME:
        raise UserError(
            f"{source.path}: has the layout of {source.layout.title}; wanted a Transformer's folder", "unsupported"
        )
    assert config.attn is not None
    wrong = sorted(set(keep_attention) - set(config.attn.layers))
    if wrong:
        raise UserError(f"{source.path}: has no layers {wrong} to keep; it has 0 to {config.num_hidden_layers - 1}")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; wanted 0 to 2^32 - 1")
    kept = sorted(set(keep_attention))
    if kept:
        # the source may have been opened without its positions
        config = read_folder_config(source.path)[2]
        assert config.attn is not None
    if copy_qv and config.attn.qkv_bias and len(kept) < config.num_hidden_layers:
        warnings.warn(
            f"{source.path}: the biases of q and v are left out where layers recur", UserWarning, stacklevel=2
        )
    started = config.replace(
        attn=dataclasses.asdict(config.attn) | {"layers": kept} if kept else None,
        use_lower_bound=len(kept) < config.num_hidden_layers,
        expand_ratio=config.expand_ratio if expand_ratio is None else expand_ratio,
    )
    return TransformerStart(source, started, copy_qv, seed)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Layers as people name them: "3,7,11", "every:4" for the last of each four, "all" or "none".

    Raises:
        UserError: it is none of them.

    Example:
        >>> parse_layers("every:4", 12)
        (3, 7, 11)
    """
    text = text.strip()
    if text in ("all", "none"):
        return tuple(range(num_layers)) if text == "all" else ()
    every = re.fullmatch(r"every:([1-9]\d{0,5})", text)
    if every:
        found = tuple(range(int(every[1]) - 1, num_layers, int(every[1])))
        if not found:
            raise UserError(f"layers {text!r}: keeps none of {num_layers}; name a smaller step, or none")
        return found
    if not re.fullmatch(r"\d{1,6}(, ?\d{1,6})*", text):
        raise UserError(f"layers {text!r}: wanted numbers such as 3,7,11, or every:4, all or none")
    return tuple(sorted({int(part) for part in text.split(",")}))


@dataclass(frozen=True)
class StartSettings:
    """Settings for replacing a Transformer's attention by recurrent layers, as on the command line.

    Attributes:
        keep_attention: see `parse_layers`; None for no layer.
        expand_ratio: see `start_from_transformer`, likewise copy_qv and seed.
        copy_qv: see expand_ratio.
        seed: see expand_ratio.
    """

    keep_attention: str | None = None
    expand_ratio: int | None = None
    copy_qv: bool = False
    seed: int = 0
