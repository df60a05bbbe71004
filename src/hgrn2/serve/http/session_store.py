"""Sessions that clients name: in memory, and in files that outlive the process."""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from pathlib import Path

from hgrn2.errors import UserError
from hgrn2.serve.http.errors import ApiError
from hgrn2.serve.sessions import Session

_NAME = re.compile(r"session-[0-9a-f]{32}")


class SessionStore:
    """Sessions by name. A name is random, so that only the client that received it knows it.

    Safe for several threads: files are read and written outside the loop of the server.

    Args:
        budget_bytes: bytes of the states in memory; the sessions that were used longest ago leave first.
        folder: folder of the files; None for none.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(self, budget_bytes: int, folder: Path | None):
        self.budget_bytes, self.folder = budget_bytes, folder
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # files that a killed process had not finished
            for partial in folder.glob(".session-*.partial"):
                partial.unlink()
        except OSError as error:
            raise UserError(
                f"{folder}: no folder for sessions ({error.strerror}); name another", "unwritable"
            ) from None

    def __len__(self) -> int:
        return len(self._sessions)

    def add(self, session: Session) -> str | None:
        """Keep a session in memory.

        Returns:
            Its name; None if it is larger than the budget.
        """
        name = f"session-{secrets.token_hex(16)}"
        return name if self._keep(name, session) else None

    def get(self, name: str) -> Session:
        """Return a session, from a file if memory no longer holds it.

        Raises:
            ApiError: no session has this name, or its file is damaged; a damaged file is removed.
        """
        self._check(name)
        with self._lock:
            found = self._sessions.get(name)
            if found is not None:
                self._sessions.move_to_end(name)
                return found
        path = self._path(name)
        if path is None or not path.is_file():
            raise _missing(name)
        try:
            session = Session.load(path)
        except UserError as error:
            if error.code in ("damaged", "unreadable"):
                path.unlink(missing_ok=True)
            raise ApiError(
                400, f"{name}: its file is damaged and was removed; begin again", error.code, "session"
            ) from None
        self._keep(name, session)
        return session

    def save(self, name: str) -> int:
        """Write a session to its file, from which a later process can read it; return the bytes of the file.

        Raises:
            ApiError: there is no session of this name, or no folder.
            UserError: the file cannot be written.
        """
        session, path = self.get(name), self._path(name)
        if path is None:
            raise ApiError(
                400, "session: the server has no folder to save to; start it with --sessions FOLDER", "unsupported"
            )
        session.save(path)
        return path.stat().st_size

    def remove(self, name: str) -> None:
        """Forget a session and remove its file.

        Raises:
            ApiError: no session has this name.
        """
        self._check(name)
        path = self._path(name)
        with self._lock:
            found = self._sessions.pop(name, None)
            if found is not None:
                self.num_bytes -= found.state.num_bytes
        if path is not None and path.is_file():
            path.unlink(missing_ok=True)
        elif found is None:
            raise _missing(name)

    def is_saved(self, name: str) -> bool:
        """Return whether a session has a file."""
        path = self._path(name)
        return path is not None and path.is_file()

    def _keep(self, name: str, session: Session) -> bool:
        session = Session(
            session.tokens, session.num_read, session.state.to("cpu"), session.model, session.num_prompt, session.seed
        )
        size = session.state.num_bytes
        if size > self.budget_bytes:
            return False
        with self._lock:
            # two requests may read the same file
            if name in self._sessions:
                return True
            while self.num_bytes + size > self.budget_bytes:
                _, gone = self._sessions.popitem(last=False)
                self.num_bytes -= gone.state.num_bytes
            self._sessions[name] = session
            self.num_bytes += size
        return True

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def _check(self, name: str) -> None:
        # a name becomes part of a path
        if not _NAME.fullmatch(name):
            raise _missing(name)


def _missing(name: str) -> ApiError:
    return ApiError(404, f"session {name[:64]!r} does not exist, or has left the memory", "not-found", "session")
