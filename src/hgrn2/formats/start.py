"""Start a recurrent model from a Transformer: new mixers among its weights (XATL, arXiv 2404.02684)."""

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

# attention averages the values of several tokens, which shrinks them; measured in docs/log.md
_VALUE_FRACTION = 0.25

_LAYER = re.compile(r"model\.layers\.(\d+)\.attn\.(.+)")


@dataclass(frozen=True)
class TransformerStart:
    """A model with new recurrent mixers and otherwise the tensors of a Transformer, read on demand.

    | tensors | source |
    | --- | --- |
    | embeddings, head, channel mixers, block norms, output projections | copied |
    | layers that keep their attention | copied |
    | q_proj, i_proj | with `copy_qv` copied from q and v, grouped v repeated to full width; otherwise like f_proj |
    | f_proj | normal, standard deviation `initializer_range` |
    | lower_bounds | 0: the bound of layer l is l / L, so that deeper layers remember for longer |
    | g_norm | a quarter of the size of the attention's values in that layer, equal for all channels |

    The norm fixes the size of the mixer's outputs, whatever the new projections are. The last row chooses about the
    size that the copied output projection expects.

    Attributes:
        source: the Transformer.
        config: our configuration, with recurrent layers.
        copy_qv: whether q and i are copied from the attention.
        seed: seed of the new tensors.
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
        """Names and shapes of our tensors, in the order of the model."""
        return model_shapes(self.config)

    @property
    def names(self) -> list[str]:
        """Names of our tensors, in the order of the model."""
        return list(self.shapes)

    def spec(self, name: str) -> Tensor:
        """Return one of our tensors as a meta tensor, with the Transformer's dtype in that layer."""
        like = self._layer_prefix(name)
        dtype = self.source.spec(self._origin(name) or (EMBEDDINGS if like is None else f"{like}o_proj.weight")).dtype
        return torch.empty(self.shapes[name], dtype=dtype, device="meta")

    def read(self, name: str) -> Tensor:
        """Return one of our tensors, copied or new."""
        origin, spec = self._origin(name), self.spec(name)
        if origin is not None:
            found = self.source.read(origin)
            if found.shape == spec.shape:
                return found
            # one head of v serves a group of heads of q
            attn = self.source.config.attn
            assert attn is not None
            assert attn.num_kv_heads is not None
            heads = found.unflatten(0, (attn.num_kv_heads, -1))
            return heads.repeat_interleave(attn.num_heads // attn.num_kv_heads, 0).flatten(0, 1)
        if name.endswith("g_norm.weight"):
            return torch.full(spec.shape, _VALUE_FRACTION * self._value_size(name), dtype=spec.dtype)
        if name == "model.lower_bounds":
            return torch.zeros(spec.shape, dtype=spec.dtype)
        # each tensor has its own random stream, so the order of reading does not matter
        generator = torch.Generator().manual_seed(self.seed * 2**24 + self.names.index(name))
        new = torch.empty(spec.shape).normal_(0, self.config.initializer_range, generator=generator)
        return new.to(spec.dtype)

    def _layer_prefix(self, name: str) -> str | None:
        """Return the prefix of a recurrent mixer's tensor names; None if the name is not one of them."""
        found = _LAYER.fullmatch(name)
        attn = self.config.attn
        if found is None or (attn is not None and int(found[1]) in attn.layers):
            return None
        return name.removesuffix(found[2])

    def _origin(self, name: str) -> str | None:
        """Return the name of the Transformer's tensor to copy; None for a new tensor."""
        prefix = self._layer_prefix(name)
        if prefix is None:
            return name if name in self.source.places else None
        copied = {"o_proj.weight": "o_proj.weight"}
        if self.copy_qv:
            copied |= {"q_proj.weight": "q_proj.weight", "i_proj.weight": "v_proj.weight"}
        own = copied.get(name.removeprefix(prefix))
        return None if own is None else prefix + own

    def _value_size(self, name: str) -> float:
        """Return the RMS of the attention's values, assuming independent input channels."""
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
    """Return a model with recurrent layers in place of a Transformer's attention.

    Args:
        source: a Transformer, opened by `open_folder` with either value of `attends`.
        keep_attention: layers that keep their attention and compute what the Transformer does.
        expand_ratio: head width of the recurrent layers; None means that of the Transformer.
        copy_qv: initialise q_proj from the attention's q and i_proj from its v.
        seed: seed of the new tensors.

    Raises:
        UserError: the source is not a Transformer, the layers or the width do not match it, or our attention does not
            support the positions of a layer to keep.
    """
    config = source.config
    if source.layout.name != transformer.NAME:
        raise UserError(
            f"{source.path}: has the layout of {source.layout.title}; wanted a Transformer's folder", "unsupported"
        )
    assert config.attn is not None
    wrong = sorted(set(keep_attention) - set(config.attn.layers))
    if wrong:
        raise UserError(
            f"{source.path}: has no layers {wrong} to keep; it has 0 to {config.num_hidden_layers - 1}", "not-found"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; wanted 0 to 2^32 - 1")
    kept = sorted(set(keep_attention))
    if kept:
        # the source may have been opened without its positions
        config = read_folder_config(source.path)[2]
        assert config.attn is not None
    if copy_qv and config.attn.qkv_bias and len(kept) < config.num_hidden_layers:
        warnings.warn(
            f"{source.path}: the biases of q and v are left out of recurrent layers", UserWarning, stacklevel=2
        )
    started = config.replace(
        attn=dataclasses.asdict(config.attn) | {"layers": kept} if kept else None,
        use_lower_bound=len(kept) < config.num_hidden_layers,
        expand_ratio=config.expand_ratio if expand_ratio is None else expand_ratio,
    )
    return TransformerStart(source, started, copy_qv, seed)


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """Parse layers such as "3,7,11", "every:4" (the last of each four), "all" or "none".

    Raises:
        UserError: the text has another form.

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
        keep_attention: layers to keep, in the syntax of `parse_layers`; None keeps none.
        expand_ratio: head width of the recurrent layers; None means that of the Transformer.
        copy_qv: initialise q_proj from the attention's q and i_proj from its v.
        seed: seed of the new tensors.
    """

    keep_attention: str | None = None
    expand_ratio: int | None = None
    copy_qv: bool = False
    seed: int = 0
