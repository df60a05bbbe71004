"""Checks the axes of annotated tensors while tests run: `BTHK` of `hgrn2.shapes` means what it says, in every call.

`install` makes every function and method of `hgrn2` with such annotations check its arguments and results once it has
returned, so that its own errors come first. One letter has one size within a call. Traced calls are not checked: a
compiler would see the checks. The package itself does not need jaxtyping, which compares the shapes.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import inspect
import sys
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Shaped, jaxtyped
from torch import Tensor


class AxesError(AssertionError):
    """A tensor does not have the axes that its annotation names."""


def install(package: str = "hgrn2") -> None:
    """Check functions of all modules of a package that are imported from here on."""
    sys.meta_path.insert(0, _Finder(package))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that checks the axes of its tensors; the function itself if no annotation names axes."""
    hints = {name: hint for name, hint in _hints(function).items() if _names_axes(hint)}
    if not hints:
        return function
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        result = function(*arguments, **keywords)
        if not torch.compiler.is_compiling():
            values = signature.bind(*arguments, **keywords).arguments | {"return": result}
            with jaxtyped("context"):
                for name, hint in hints.items():
                    _check(function.__qualname__, name, values.get(name), hint)
        return result

    return call


def check_module(module: types.ModuleType) -> None:
    """Replace the functions and methods that a module defines by ones that check."""
    for name, value in list(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if isinstance(value, types.FunctionType):
            setattr(module, name, checked(value))
        elif isinstance(value, type):
            for attribute, method in list(vars(value).items()):
                if isinstance(method, types.FunctionType) and checked(method) is not method:
                    setattr(value, attribute, checked(method))


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    hints = {}
    for name, hint in function.__annotations__.items():
        if isinstance(hint, str):
            try:
                hint = eval(hint, function.__globals__)
            except NameError:
                # imported for type checkers only
                continue
        hints[name] = hint
    return hints


def _names_axes(hint: Any) -> bool:
    return _axes(hint) is not None or any(_names_axes(part) for part in typing.get_args(hint))


def _axes(hint: Any) -> str | None:
    if typing.get_origin(hint) is Annotated and hint.__origin__ is Tensor:
        return next((word for word in hint.__metadata__ if isinstance(word, str)), None)
    return None


def _check(function: str, name: str, value: Any, hint: Any) -> None:
    axes = _axes(hint)
    if axes is None:
        if typing.get_origin(hint) is tuple and isinstance(value, tuple):
            for i, (part, part_hint) in enumerate(zip(value, typing.get_args(hint), strict=False)):
                _check(function, f"{name}[{i}]", part, part_hint)
        elif typing.get_origin(hint) in (types.UnionType, typing.Union):
            for part_hint in typing.get_args(hint):
                _check(function, name, value, part_hint)
    # values of another type are none of the axes' business, and comparing symbolic sizes would set guards
    elif (
        isinstance(value, Tensor)
        and all(type(size) is int for size in value.shape)
        and not isinstance(value, Shaped[Tensor, axes])
    ):
        raise AxesError(f"{function}: {name} has shape {list(value.shape)}, annotated [{axes}]")


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> Any:
        if name.partition(".")[0] != self._package:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_check(module: types.ModuleType) -> None:
                execute(module)
                check_module(module)

            spec.loader.exec_module = execute_and_check
        return spec
