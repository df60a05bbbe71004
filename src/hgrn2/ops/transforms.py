"""Transforms of torch.func: look through their tensors, and make operators of torch's library work under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]

from hgrn2.errors import UserError


def are_transforms_active() -> bool:
    """Return whether a transform of torch.func is running, outside of a trace."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_batched(x: Tensor) -> bool:
    """Return whether vmap runs over x, at any depth of transforms: the values of such a tensor cannot be read."""
    return are_transforms_active() and any(map(_functorch.is_batchedtensor, _levels(x)))


def records_gradient(x: Tensor) -> bool:
    """Return whether a gradient of x is recorded, at any depth of transforms; vmap hides `requires_grad`."""
    return x.requires_grad or (are_transforms_active() and any(level.requires_grad for level in _levels(x)))


def _levels(x: Tensor) -> Iterator[Tensor]:
    """Iterate over x and the tensors that it wraps, one for each transform."""
    yield x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
        yield x


def map_by_loop(operator: Any) -> None:
    """Let vmap run an operator once for every element: the same numbers as a loop, and no speed-up.

    Args:
        operator: an operator from `torch.library.custom_op` that returns a tensor or a tuple of tensors. An argument
            that it changes in place must be mapped over, or a UserError is raised.
    """
    changed = [i for i, argument in enumerate(operator._opoverload._schema.arguments) if argument.is_write]

    def loop(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        if any(in_dims[i] is None for i in changed):
            raise UserError(
                "a tensor that vmap does not map over cannot be changed in place by those it maps over; give each its "
                "own, or inplace=False",
                "unsupported",
            )
        # views, so that a change in place reaches the tensor
        parts = [
            [x] * info.batch_size if dim is None else x.unbind(dim) for x, dim in zip(arguments, in_dims, strict=True)
        ]
        found = [operator(*some) for some in zip(*parts, strict=True)]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        results = tuple(torch.stack(some) for some in zip(*found, strict=True))
        return results, (0,) * len(results)

    operator.register_vmap(loop)


def differentiable_by_transforms(
    operator: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any], refusal: Callable[..., str]
) -> Callable[..., Any]:
    """Let torch.func differentiate an operator, which torch.library's own registration does not.

    Args:
        operator: an operator of torch's library.
        setup: saves what `backward` needs, as `setup_context` of an autograd.Function.
        backward: returns the gradients, as `backward` of an autograd.Function.
        refusal: returns the message of the error about forward mode, from the arguments of the operator.

    Returns:
        A function that calls the operator.
    """

    class Transformed(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            return operator(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if not are_transforms_active():
            return operator(*inputs)
        try:
            return Transformed.apply(*inputs)
        except NotImplementedError as error:
            if "jvp" not in str(error):
                raise
            # forward mode inside another transform, where its tangents are hidden
            raise NotImplementedError(refusal(*inputs)) from error

    return call


def refuse_derivatives(operator: Any, message: str) -> Callable[..., Any]:
    """Make an operator raise a RuntimeError where it is differentiated, and a NotImplementedError in forward mode.

    Args:
        operator: an operator from `torch.library.custom_op`.
        message: the message of both.

    Returns:
        A function that calls the operator.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del ctx, inputs, output

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(message)

    operator.register_autograd(refuse, setup_context=setup)
    return differentiable_by_transforms(operator, setup, refuse, lambda *_: message)
