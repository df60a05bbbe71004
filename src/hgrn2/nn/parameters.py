"""Initial values and optimizer roles of parameters: each module sets its own, through the functions here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hgrn2.errors import UserError
from hgrn2.nn.norm import Norm
from hgrn2.nn.short_conv import ShortConv

ROLES = frozenset({"matrix", "embedding", "head", "vector", "lower_bounds"})


@dataclass(frozen=True)
class InitialValues:
    """Distribution of the initial values of one layer.

    Attributes:
        std: standard deviation of the projections.
        layer: index of the layer, from 0.
        num_layers: layers of the model.
        generator: source of the random numbers; None for torch's global one.
    """

    std: float
    layer: int
    num_layers: int
    generator: torch.Generator | None = None

    @property
    def end_std(self) -> float:
        """Standard deviation of the projections that end a residual branch; a model has two of them per layer."""
        return self.std / math.sqrt(2 * self.num_layers)

    def draw(self, *modules: nn.Module | None) -> None:
        """Initialise the parameters of modules, in this order; skip None."""
        for module in modules:
            if module is not None:
                draw(module, self.std, self.generator)

    def draw_end(self, module: nn.Module) -> None:
        """Initialise the projection that ends a residual branch."""
        draw(module, self.end_std, self.generator)


@torch.no_grad()
def draw(module: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Initialise the parameters of one module.

    | module | weight | bias |
    | --- | --- | --- |
    | Linear, Embedding, ShortConv | normal, standard deviation std | 0 |
    | Norm | 1 | 0 |

    Args:
        module: a module of one of these classes.
        std: standard deviation.
        generator: source of the random numbers; None for torch's global one.
    """
    if isinstance(module, Norm):
        if module.weight is not None:
            nn.init.ones_(module.weight)
    else:
        assert isinstance(module, nn.Linear | nn.Embedding | ShortConv), f"no initial values for {type(module)}"
        nn.init.normal_(module.weight, 0.0, std, generator=generator)
    if isinstance(module, nn.Linear | Norm) and module.bias is not None:
        nn.init.zeros_(module.bias)


class SkippedDraws(TorchFunctionMode):
    """Context in which constructors of torch's modules leave their weights uninitialised.

    For modules whose initial values are drawn afterwards. The CPU's generator advances as if the weights were drawn, so
    a seed gives the same model with and without this context, but memory is not written.
    """

    _UNIFORM = frozenset({nn.init.kaiming_uniform_, nn.init.uniform_, Tensor.uniform_})
    _CHUNK = 1 << 20

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, but only advance the generator in place of uniform draws."""
        kwargs = kwargs or {}
        if func not in self._UNIFORM:
            return func(*args, **kwargs)
        x = kwargs.get("tensor", args[0] if args else None)
        if kwargs.get("generator") is not None or x.device.type != "cpu" or x.dtype != torch.float32:
            return func(*args, **kwargs)
        # a byte takes as many bits from the generator as a float32, and is faster
        drawn = torch.empty(min(x.numel(), self._CHUNK), dtype=torch.uint8)
        for start in range(0, x.numel(), self._CHUNK):
            drawn[: x.numel() - start].random_()
        return x


def parameter_roles(module: nn.Module) -> dict[str, str]:
    """Return the optimizer's role of each parameter of a module, by name.

    The weight of an `nn.Linear` is a "matrix", that of an `nn.Embedding` an "embedding"; every other parameter is a
    "vector" of any shape. A submodule with a method `parameter_roles` overrides this for its parameters.

    Args:
        module: the module; its own method `parameter_roles` is not called.

    Raises:
        UserError: a submodule's own method leaves out a parameter, or returns an unknown role.
    """
    roles = {}
    for name, parameter in module.named_parameters(recurse=False):
        is_matrix = isinstance(module, nn.Linear) and parameter is module.weight
        roles[name] = "matrix" if is_matrix else "embedding" if isinstance(module, nn.Embedding) else "vector"
    for name, child in module.named_children():
        own = getattr(child, "parameter_roles", None)
        found = parameter_roles(child) if own is None else check_roles(child, own())
        roles |= {f"{name}.{inner}": role for inner, role in found.items()}
    return roles


def check_roles(module: nn.Module, roles: Mapping[str, str]) -> Mapping[str, str]:
    """Return the result of a module's method `parameter_roles`.

    Args:
        module: the module.
        roles: role of each parameter, by name.

    Raises:
        UserError: a parameter has no role ("incomplete"), or a role does not exist ("unknown-name").
    """
    what = f"{type(module).__name__}.parameter_roles"
    if not isinstance(roles, Mapping):
        raise UserError(f"{what} returns {roles!r}; wanted roles by name", "incomplete")
    if missing := [name for name, _ in module.named_parameters() if name not in roles]:
        raise UserError(
            f"{what} leaves out {', '.join(missing)}; add them to those of hgrn2.nn.parameters.parameter_roles(self)",
            "incomplete",
        )
    for name, role in roles.items():
        if not isinstance(role, str) or role not in ROLES:
            raise UserError(
                f"{what}: {name} has the role {role!r}; wanted one of {', '.join(sorted(ROLES))}", "unknown-name"
            )
    return roles
