"""Start a classifier with weights pretrained on masked tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from hgrn2.errors import UserError
from hgrn2.formats.run_folder import locate_model
from hgrn2.formats.soundness import MODEL_NAME
from hgrn2.models.classifier import SequenceClassifier


@torch.no_grad()
def load_pretrained(model: SequenceClassifier, run: Path) -> None:
    """Copy the weights of a run's best checkpoint, except those of its heads.

    Args:
        model: the model.
        run: a run folder or a checkpoint, of a model with the same layers.

    Raises:
        UserError: there is no checkpoint, or its weights do not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    checkpoint, _ = locate_model(run, "best")
    try:
        found = load_file(checkpoint / MODEL_NAME)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{checkpoint}: its weights cannot be read ({error})", "unreadable") from None
    for name, parameter in model.state_dict().items():
        if name.startswith(("head", "token_head", "mask_")):
            continue
        if name not in found or found[name].shape != parameter.shape:
            raise UserError(f"{run}: {name} does not fit; name a run with the same model and options", "mismatch")
        parameter.copy_(found[name])
