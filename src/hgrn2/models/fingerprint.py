"""A fingerprint of a model, which its states carry."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

# values of each tensor that go into the fingerprint
_SAMPLED = 64


def fingerprint(model: nn.Module) -> str:
    """Return a hash of a model's settings and the first values of each parameter, which training changes.

    Args:
        model: a model with a `config`, in any dtype of its weights.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())  # pyright: ignore
    for name, x in model.named_parameters():
        # in one dtype: a state may be continued by the same model in another dtype
        some = x.detach().flatten()[:_SAMPLED].to("cpu", torch.bfloat16)
        digest.update(name.encode() + bytes(some.view(torch.uint8).tolist()))
    return digest.hexdigest()
