"""Sessions: the state of a text that pauses, moves to a file or another engine, and continues exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hgrn2.errors import UserError
from hgrn2.models.fingerprint import fingerprint
from hgrn2.models.state import ModelState
from hgrn2.nn.mixers.base import StateSpec
from hgrn2.storage.tensor_files import read_tensors, write_tensors

SESSION_FORMAT = "hgrn2-session-1"
_REMEDY = "name a file made by Session.save"


@dataclass(frozen=True)
class Session:
    """A text and the state after all of its tokens but the last ones.

    A session is a value: any number of requests may continue it.

    Attributes:
        tokens: all tokens of the text.
        num_read: how many of them the state has read; fewer than all, so that the next token can be drawn.
        state: the state of one sequence.
        model: fingerprint of the model.
        num_prompt: tokens before those that were written.
        seed: seed of the random numbers of the continuation, so that `Engine.resume` draws on; None for none.
    """

    tokens: tuple[int, ...]
    num_read: int
    state: ModelState
    model: str
    num_prompt: int = 0
    seed: int | None = None

    def save(self, path: str | Path) -> None:
        """Write the session to a file atomically, with a digest.

        Raises:
            UserError: the file cannot be written.
        """
        about = {
            "format": SESSION_FORMAT, "tokens": list(self.tokens), "num_read": self.num_read, "model": self.model,
            "num_prompt": self.num_prompt, "seed": self.seed,
        }  # fmt: skip
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state.tensors().items()}
        write_tensors(Path(path), about, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Session:
        """Read a session from a file.

        Raises:
            UserError: the file is missing, damaged or not a session.
        """
        path = Path(path)
        about, tensors = read_tensors(path, (SESSION_FORMAT,), _REMEDY)
        damaged = UserError(f"{path}: incomplete or damaged; {_REMEDY}", "damaged")
        try:
            tokens, num_read, num_prompt, seed = (about[key] for key in ("tokens", "num_read", "num_prompt", "seed"))
            state, model = ModelState.from_tensors(tensors), str(about["model"])
        except (KeyError, TypeError, ValueError):
            raise damaged from None
        whole = isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)
        numbers = all(type(x) is int for x in (num_read, num_prompt)) and (seed is None or type(seed) is int)
        if not whole or not numbers or not 0 <= num_read < len(tokens) or not 0 <= num_prompt <= len(tokens):
            raise damaged
        return cls(tuple(tokens), num_read, state, model, num_prompt, seed)


def check_session(session: Any, model: nn.Module, specs: list[dict[str, StateSpec]], model_hash: str) -> Session:
    """Return a session whose state has the dtypes and the device of a model.

    Args:
        session: the argument of a caller.
        model: the model that continues it.
        specs: from its `state_spec`.
        model_hash: its fingerprint.

    Raises:
        UserError: the session belongs to another model.
    """
    if not isinstance(session, Session):
        raise UserError(f"session is {type(session).__name__}; wanted an hgrn2.serve.Session")
    if session.model != model_hash:
        raise UserError("session: made with another model; continue it with the model it was made with", "mismatch")
    device = next(model.parameters()).device
    state = session.state.check(specs, 1).to(device)
    return Session(session.tokens, session.num_read, state, session.model, session.num_prompt, session.seed)


def model_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint that sessions of a model carry."""
    return fingerprint(model)
