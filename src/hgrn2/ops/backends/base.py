"""The protocol of backends, their registry, and the choice of one for a call."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from hgrn2.errors import UserError
from hgrn2.ops.call import CallTraits, ScanCall, ScanGradients
from hgrn2.registries import check_name
from hgrn2.shapes import BHKV, BHV, BTHV, NHKV

AUTO = "auto"


class Unavailable(str):
    """Reason for a rejection that installing something would resolve; "auto" warns about it."""

    __slots__ = ()


class Backend(Protocol):
    """Protocol of an implementation of scans and steps.

    Derived classes inherit defaults: no plan, no tensor kept for the backward pass, and their own steps.

    Attributes:
        name: name in the `backend` argument of the operators.
        opaque: those of "scan" and "step" that run as operators of torch's library, into which neither torch.compile
            nor autograd looks. An opaque scan needs `backward`; the gradient of an opaque step is that of a scan of one
            token. A scan or step that is not opaque consists of differentiable operations of torch.
    """

    name: str
    opaque: tuple[str, ...] = ("scan",)

    def rejects(self, traits: CallTraits) -> str | None:
        """Return the reason why it cannot run such calls, or None, without waiting for a device.

        Args:
            traits: traits of the calls.
        """
        ...

    def step_backend(self, traits: CallTraits) -> str:
        """Return the name of the backend whose step it uses, by default its own.

        Args:
            traits: traits of the step.
        """
        return self.name

    def plan(self, call: ScanCall, needs_grad: bool) -> tuple[ScanCall, int]:
        """Return the call as `forward` takes it, and a number that determines the size of what it keeps.

        This runs outside the operator: autograd differentiates operations of torch that prepare the call, and a traced
        program holds the number.

        Args:
            call: the call.
            needs_grad: whether a backward pass may follow.
        """
        return call, 0

    def kept_shape(self, call: ScanCall, plan: int) -> tuple[int, ...]:
        """Return the shape of the tensor that `forward` keeps, from shapes alone; (0,) for none.

        Args:
            call: the call; its tensors may be fake.
            plan: number returned by `plan`.
        """
        return (0,)

    def forward(self, call: ScanCall, plan: int) -> tuple[BTHV, NHKV, Tensor | None]:
        """Run a scan.

        Args:
            call: the call.
            plan: number returned by `plan`.

        Returns:
            y [B, T, H, V] in q's dtype, the final state [N, H, K, V] in the state dtype, and a tensor in the state
            dtype that is kept for `backward`, or None. All are new and contiguous.
        """
        ...

    def backward(
        self, call: ScanCall, plan: int, kept: Tensor | None, dy: BTHV, d_final_state: NHKV | None,
        bound_wanted: bool,
    ) -> ScanGradients:  # fmt: skip
        """Return the gradient of `forward`.

        Args:
            call: the call.
            plan: number returned by `plan`.
            kept: tensor that `forward` kept; unspecified if it kept none.
            dy: [B, T, H, V], gradient of the outputs.
            d_final_state: [N, H, K, V], gradient of the final state; None for zeros.
            bound_wanted: whether to compute the gradient of the lower bound.
        """
        raise AssertionError(f"autograd differentiates the forward pass of {self.name}")

    def step(self, call: ScanCall, in_place: bool) -> tuple[BHV, BHKV]:
        """Run one token.

        Args:
            call: q, f [B, H, K], v [B, H, V], lower_bound and initial_state [B, H, K, V].
            in_place: write the new state over the initial one.

        Returns:
            y [B, H, V] in q's dtype and the new state.
        """
        ...


_OPERATORS = ("scan", "step")
_PARTS = ("name", "opaque", "rejects", "step_backend", "plan", "kept_shape", "forward", "backward", "step")
_backends: dict[str, Backend] = {}
_auto_order: tuple[str, ...] = ()
_warned = False


def register(backend: Backend) -> None:
    """Make a backend known by its name.

    Args:
        backend: an instance of a class that derives from `Backend` or has all its parts.

    Raises:
        UserError: the name is taken ("already-exists") or not a word, or a part is missing or of another type
            ("incomplete").
    """
    if isinstance(backend, type):
        raise UserError(f"backend {backend.__name__}: is a class; pass an object of it, {backend.__name__}()")
    missing = [part for part in _PARTS if not _has(backend, part)]
    label = repr(getattr(backend, "name", type(backend).__name__))
    if missing:
        raise UserError(f"backend {label} lacks {', '.join(missing)}; define what `Backend` asks for", "incomplete")
    check_name("backend", backend.name)
    opaque = backend.opaque
    if not isinstance(opaque, tuple | frozenset | set) or any(x not in _OPERATORS for x in opaque):
        raise UserError(f"backend {label}: opaque is {opaque!r}; wanted a tuple of {_OPERATORS}", "incomplete")
    if backend.name == AUTO:
        raise UserError(f"backend {label}: the name is reserved; choose another name", "already-exists")
    if backend.name in _backends:
        raise UserError(f"backend {label} is registered already; choose another name", "already-exists")
    _backends[backend.name] = backend


def _has(backend: Any, part: str) -> bool:
    if part == "name":
        return hasattr(backend, part)
    opaque = getattr(backend, "opaque", None)
    if part == "backward" and isinstance(opaque, tuple | frozenset | set) and "scan" not in opaque:
        return True
    # looked up in the class: an attribute that is computed on first use may import a compiler
    found = getattr(backend, "__dict__", {}).get(part, getattr(type(backend), part, None))
    is_required = part in ("rejects", "forward", "backward", "step")
    return found is not None and not (is_required and found is getattr(Backend, part))


def unregister(name: str) -> None:
    """Remove a backend from the registry and from the order of "auto".

    Args:
        name: name of a registered backend.
    """
    find(name)
    del _backends[name]
    set_auto_order(*(other for other in _auto_order if other != name))


@contextlib.contextmanager
def registered(*backends: Backend, auto_order: tuple[str, ...] | None = None) -> Iterator[None]:
    """Register backends for a block; each replaces a backend with its name.

    Args:
        *backends: backends to register.
        auto_order: names of backends in the order in which "auto" tries them; None to keep the order.
    """
    before, order = dict(_backends), _auto_order
    try:
        for backend in backends:
            if isinstance(name := getattr(backend, "name", None), str):
                _backends.pop(name, None)
            register(backend)
        if auto_order is not None:
            set_auto_order(*auto_order)
        yield
    finally:
        _backends.clear()
        _backends.update(before)
        set_auto_order(*order)


def auto_order() -> tuple[str, ...]:
    """Return the backends that "auto" tries, in order."""
    return _auto_order


def set_auto_order(*names: str) -> None:
    """Set the order in which "auto" tries backends: it takes the first that does not reject a call.

    Args:
        *names: names of registered backends.
    """
    global _auto_order
    for name in names:
        find(name)
    _auto_order = names


def backend_names() -> tuple[str, ...]:
    """Return the valid values of `backend`: "auto" and the names of all registered backends."""
    return (AUTO, *_backends)


def check_backend(backend: str) -> None:
    """Raise a UserError unless this is "auto" or the name of a backend.

    Args:
        backend: the name.
    """
    # a name of another type may have no hash
    if not isinstance(backend, str) or (backend != AUTO and backend not in _backends):
        raise _unknown(backend, backend_names())


def find(name: str) -> Backend:
    """Return a registered backend.

    Args:
        name: its name.

    Raises:
        UserError: no backend has this name.
    """
    if not isinstance(name, str) or name not in _backends:
        raise _unknown(name, tuple(_backends))
    return _backends[name]


def _unknown(name: object, known: tuple[str, ...]) -> UserError:
    return UserError(f"backend is {name!r}; wanted one of {', '.join(map(repr, known))}", "unknown-name")


def choose(backend: str, traits: CallTraits) -> Backend:
    """Return the backend that runs a call.

    Args:
        backend: "auto" or a name.
        traits: traits of the call.

    Raises:
        UserError: the name is unknown ("unknown-name"), or the backend cannot run the call ("unsupported", or
            "unavailable" if something could be installed).
    """
    check_backend(backend)
    if backend == AUTO:
        return _first_that_runs(traits)
    found = _backends[backend]
    if traits.is_step:
        found = find(found.step_backend(traits))
    reason = found.rejects(traits)
    if reason is not None:
        code = "unavailable" if isinstance(reason, Unavailable) else "unsupported"
        raise UserError(f"backend {found.name!r} cannot run: {reason}; use 'auto' or 'chunked'", code)
    return found


def _first_that_runs(traits: CallTraits) -> Backend:
    missing = None
    for name in _auto_order:
        found = _backends[name]
        reason = found.rejects(traits)
        if reason is None:
            if missing is not None:
                _warn_once(
                    f"{missing}: operations without a kernel run as plain torch, which is several times slower on a GPU"
                )
            return found
        if isinstance(reason, Unavailable):
            missing = reason
    tried = f"none of {', '.join(_auto_order)} can run such a call" if _auto_order else "its order is empty"
    raise UserError(f"backend is 'auto', and {tried}; name a backend, or set_auto_order(...)", "unsupported")


def resolve_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    k_width: int,
    v_width: int,
    cuda_eligible: bool = True,
) -> str:
    """Return the name of the backend that a request for `backend` means.

    Args:
        backend: "auto" or the name of a backend.
        device: device of the inputs.
        dtype: dtype of the inputs.
        k_width: K.
        v_width: V.
        cuda_eligible: whether the call is a scan from pre-activations of fewer than 65,536 sequences, which the CUDA
            kernels can launch.

    Raises:
        UserError: the name is unknown, or the backend cannot run such a call.
    """
    return choose(backend, CallTraits(device, dtype, k_width, v_width, is_tied=cuda_eligible)).name


def _warn_once(message: str) -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=5)
