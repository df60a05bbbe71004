"""Check the inputs of a language model; errors name the arguments of its methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hgrn2.errors import UserError
from hgrn2.models.state import ModelState
from hgrn2.nn.mixers.registry import find_mixer
from hgrn2.ops.checks import can_read_values
from hgrn2.shapes import describe

_IDS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def checked_ids(name: str, ids: Tensor, shape: str, embeddings: nn.Embedding, ignored: int | None = None) -> Tensor:
    """Return token ids in int64.

    Args:
        name: name of the argument.
        ids: the argument.
        shape: the wanted axes, e.g. "[B, T]".
        embeddings: embeddings of the model.
        ignored: a further id that is allowed, besides those of the vocabulary.

    Raises:
        UserError: the argument is not a tensor of integers, or has other axes or another device than the model, or an
            id outside the vocabulary. Values are checked only on the CPU, where no synchronisation is needed, and
            not where vmap runs over them.
    """
    if not isinstance(ids, Tensor) or ids.dtype not in _IDS or ids.dim() != shape.count(",") + 1:
        raise UserError(f"{name} is {describe(ids)}; wanted a tensor {shape} of int64")
    if _is_elsewhere(ids, embeddings):
        raise UserError(
            f"{name} is on {ids.device} and the model on {embeddings.weight.device}; move one of them with .to()"
        )
    if can_read_values(ids):
        known = ids if ignored is None else ids[ids != ignored]
        vocab_size = embeddings.num_embeddings
        if known.numel() and not 0 <= int(known.min()) <= int(known.max()) < vocab_size:
            also = "" if ignored is None else f", and {ignored} where no target counts"
            raise UserError(
                f"{name} has ids from {int(known.min())} to {int(known.max())}; "
                f"the vocabulary has 0 to {vocab_size - 1}{also}"
            )
    return ids.long()


def checked_mask(mask: Tensor, input_ids: Tensor) -> Tensor:
    """Return an attention mask as bool, on the device of the ids.

    Raises:
        UserError: the mask is not a tensor, or has another shape.
    """
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask is {describe(mask)}; wanted a tensor {list(input_ids.shape)}, 0 where input_ids is padding"
        )
    return mask.to(input_ids.device).bool()


def check_mixers(names: Iterable[str], cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
    """Raise a UserError if a mixer does not support the packed sequences or the padding given.

    Args:
        names: names of the mixers.
        cu_seqlens: bounds of packed sequences, or None.
        mask: attention mask, or None.
    """
    for name in names:
        mixer = find_mixer(name).mixer
        if cu_seqlens is not None and not mixer.can_pack:
            raise UserError(f"the mixer {name} does not support packed sequences; leave cu_seqlens out", "unsupported")
        if mask is not None and not mixer.can_pad:
            raise UserError(
                f"the mixer {name} does not support padding; give sequences of one length, without a mask",
                "unsupported",
            )


def check_pieces(layers: Iterable[Any], count: int, state: Any, mask: Tensor | None) -> None:
    """Raise a UserError if a model cannot run on sequences split over ranks.

    Args:
        layers: blocks of the model.
        count: number of pieces.
        state: state before the sequences, or None.
        mask: attention mask, or None.
    """
    for layer in layers:
        mixer = layer.attn
        name = type(mixer).__name__
        if not mixer.can_split or mixer.direction != "causal":
            raise UserError(
                f"the mixer {name} does not support sequences split over processes; leave context_parallel out",
                "unsupported",
            )
        heads = getattr(mixer, "num_kv_heads", count)
        if heads % count:
            raise UserError(
                f"the mixer {name} has {heads} heads of keys, which {count} processes cannot share; use a "
                "context_parallel that divides them",
                "contradiction",
            )
    if state is not None or mask is not None:
        raise UserError("sequences split over processes take neither a state nor a mask", "contradiction")


def check_state(state: ModelState, num_layers: int, num_sequences: int, embeddings: nn.Embedding) -> None:
    """Raise a UserError unless a state fits the number of layers and sequences, and the device.

    Args:
        state: the argument.
        num_layers: layers of the model.
        num_sequences: sequences of the input.
        embeddings: embeddings of the model.
    """
    if not isinstance(state, ModelState):
        raise UserError(f"state is {describe(state)}; wanted a ModelState from an earlier call or init_state")
    if len(state.layers) != num_layers:
        raise UserError(
            f"state belongs to a model with {len(state.layers)} layers; this one has {num_layers}", "mismatch"
        )
    for tensors in state.layers:
        for name, x in tensors.items():
            if x.shape[0] != num_sequences:
                raise UserError(
                    f"state holds {x.shape[0]} sequences ({name}); the input has {num_sequences}", "mismatch"
                )
            if _is_elsewhere(x, embeddings):
                raise UserError(
                    f"state is on {x.device} and the model on {embeddings.weight.device}; move it with state.to()"
                )


def _is_elsewhere(x: Tensor, embeddings: nn.Embedding) -> bool:
    weight = embeddings.weight
    # offloaded weights may be on another device until they are needed
    return not weight.is_meta and x.device != weight.device and not hasattr(embeddings, "_hf_hook")
