"""Maps of what each patch contributes to the pooled output."""

from __future__ import annotations

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.models.vision.model import VisionModel


def token_contribution(model: VisionModel, images: Tensor, classes: Tensor | None = None) -> Tensor:
    """Compute the contribution of each patch to a class's logit: gradient times input at the tokens of the stem.

    To first order, this is how much the logit falls when the token of the patch is set to zero. Its magnitude shows how
    much of the patch is left in the pooled output after all states have decayed.

    Args:
        model: the model, which is used in evaluation mode.
        images: [B, C, H, W], normalised.
        classes: [B] int64, a class of each image; None means the class with the highest logit.

    Returns:
        [B, rows, columns] in float32.

    Raises:
        UserError: the model has no classifier.
    """
    if not model.num_classes:
        raise UserError("the model has no classifier (num_classes = 0), so there is no class to explain", "unsupported")
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            tokens, grid = model.embed(images)
            tokens = tokens.detach().float().requires_grad_()
            logits = model.forward_head(model.run_from(tokens, grid)).float()
            chosen = logits.argmax(1) if classes is None else classes
            (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), tokens)
    finally:
        model.train(was_training)
    return (gradient * tokens).sum(2).detach().unflatten(1, grid)
