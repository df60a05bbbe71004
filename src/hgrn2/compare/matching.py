"""Match the sizes of models by the width of their channel mixers."""

from __future__ import annotations

from typing import Any

import torch

from hgrn2.errors import UserError
from hgrn2.models import HGRN2Config

# largest difference in parameters, as a fraction
TOLERANCE = 0.02
# a width that is a multiple of more is faster; the difference stays below this fraction
_ROUNDING = 0.002
_MULTIPLES = (64, 16, 8, 1)


def count_parameters(task: type[Any], options: Any, config: HGRN2Config) -> int:
    """Return the number of parameters of a task's model, built on the meta device.

    Args:
        task: the class of the task.
        options: options of the task.
        config: configuration of the model.
    """
    with torch.device("meta"):
        model = task.build_model(options, config)
    return sum(p.numel() for p in model.parameters())


def match_size(name: str, task: type[Any], options: Any, config: HGRN2Config, wanted: int) -> HGRN2Config:
    """Return the configuration with the width of the channel mixer that comes nearest to a number of parameters.

    The number of parameters is linear in this width, so two counts determine it.

    Args:
        name: name of the model, for messages.
        task: the class of the task.
        options: options of the task.
        config: configuration of the model.
        wanted: the number of parameters.

    Raises:
        UserError: no width comes within 2 %; the message names the nearest size.
    """

    def count(width: int) -> int:
        return count_parameters(task, options, config.replace(intermediate_size=width))

    base = count(1)
    per_unit = count(2) - base
    width = max(1, round(1 + (wanted - base) / per_unit))
    for multiple in _MULTIPLES:
        rounded = max(1, round(width / multiple)) * multiple
        found = base + (rounded - 1) * per_unit
        if abs(found - wanted) <= _ROUNDING * wanted or multiple == 1:
            break
    try:
        found = count(rounded)
    except UserError as error:
        raise UserError(
            f"models.{name}: cannot have {wanted:,} parameters: {error}; change match", "contradiction"
        ) from None
    if abs(found - wanted) > TOLERANCE * wanted:
        raise UserError(
            f"models.{name}: cannot have {wanted:,} parameters within {TOLERANCE:.0%}; the nearest is {found:,}, with "
            f"intermediate_size = {rounded}; change the size of the first model, or hidden_size, num_hidden_layers or "
            'the mixer of this one, or set match = "none"',
            "contradiction",
        )
    return config.replace(intermediate_size=rounded)
