"""Load and save models in one call, with their tokenizers, in any layout.

Importing this module needs torch only. Its functions need the packages of the extra "train" and say so if one is
missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hgrn2.errors import MissingPackage, UserError
from hgrn2.extras import install_command
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.models.sampling import Sampling
from hgrn2.shapes import describe

if TYPE_CHECKING:
    from hgrn2.data.tokenizer import Tokenizer


class LoadedModel(NamedTuple):
    """A model and its tokenizer; unpacks as `model, tokenizer = hgrn2.load(...)`.

    Attributes:
        model: the model, in float32 and in evaluation mode.
        tokenizer: its tokenizer, with `encode(text)` and `decode(ids)`.
    """

    model: HGRN2LM
    tokenizer: Tokenizer

    def write(
        self, prompt: str, max_tokens: int = 256, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> str:
        """Continue a prompt.

        `hgrn2.inference.Writer` yields the text piece by piece and keeps the state.

        Args:
            prompt: text to continue; may be empty.
            max_tokens: maximum number of tokens to generate.
            sampling: how tokens are sampled; None means the defaults.
            stop: texts that end the generation; they are not returned.

        Returns:
            The text after the prompt.
        """
        from hgrn2.inference.writing import Writer

        return "".join(Writer(self.model, self.tokenizer, sampling or Sampling()).write(prompt, max_tokens, stop))


def load(path: str | Path, checkpoint: str = "latest", device: str | torch.device = "auto") -> LoadedModel:
    """Load a trained model and its tokenizer.

    Args:
        path: a run folder, one of its checkpoints, or a folder of any layout that `hgrn2 convert` knows.
        checkpoint: of a run folder, "latest" or "best" (the best validation loss).
        device: "cpu", "cuda", ...; "auto" takes the first GPU if there is one.

    Returns:
        The model in float32 and evaluation mode, and the tokenizer.

    Raises:
        UserError: there is no model, tokenizer or device of that name, or a file is damaged.
        MissingPackage: a package of the extra "train" is not installed.

    Example:
        >>> model, tokenizer = hgrn2.load("runs/notes")                 # doctest: +SKIP
        >>> print(hgrn2.load("runs/notes").write("Once upon a time"))   # doctest: +SKIP
    """
    with _needs_extra("hgrn2.load"):
        from hgrn2.data import load_tokenizer

    def read(place: Path, tokenizer_dir: Path, to: torch.device) -> LoadedModel:
        from hgrn2.data.find_tokenizer import tokenizer_of
        from hgrn2.formats.native import task_name
        from hgrn2.formats.opening import open_folder

        saved = open_folder(place)
        task = task_name(saved.settings)
        if task is not None and tokenizer_of(tokenizer_dir) is None:
            raise UserError(
                f"{path}: a model of task {task!r}, which reads no text, so there is no tokenizer; it cannot read or "
                "write text. HGRN2LM.load opens it without one",
                "unsupported",
            )
        tokenizer = load_tokenizer(tokenizer_dir)
        tokenizer.check_fits(saved.config.vocab_size)
        return LoadedModel(saved.load(to), tokenizer)

    return _read(path, checkpoint, device, read)


def load_weights(path: str | Path, checkpoint: str = "latest", device: str | torch.device = "auto") -> HGRN2LM:
    """Load a trained model without its tokenizer, which may be missing.

    Args:
        path: a run folder, one of its checkpoints, or a folder of any layout that `hgrn2 convert` knows.
        checkpoint: of a run folder, "latest" or "best" (the best validation loss).
        device: "cpu", "cuda", ...; "auto" takes the first GPU if there is one.

    Returns:
        The model in float32 and evaluation mode.

    Raises:
        UserError: there is no model or device of that name, or a file is damaged.
        MissingPackage: a package of the extra "train" is not installed.
    """
    with _needs_extra("HGRN2LM.load"):
        from hgrn2.formats.opening import open_folder
    return _read(path, checkpoint, device, lambda place, _, to: open_folder(place).load(to))


def _read(path: str | Path, checkpoint: str, device: str | torch.device, read: Any) -> Any:
    """Locate the folder of a model and read it; retry if training replaces it meanwhile.

    Args:
        path: a run folder, one of its checkpoints, or a folder of any layout.
        checkpoint: of a run folder, "latest" or "best".
        device: name of the device.
        read: called with the folder of the weights, that of the tokenizer, and the device; returns the result.
    """
    with _needs_extra("opening a model"):
        from hgrn2.devices import choose_device
        from hgrn2.formats.run_folder import locate_model, read_while_training
    if not isinstance(path, str | Path) or not str(path):
        raise UserError(f"path is {describe(path)}; wanted a run folder, a checkpoint, or a folder with a model")
    if checkpoint not in ("latest", "best"):
        raise UserError(f"checkpoint is {checkpoint!r}; wanted 'latest' or 'best'")
    place, where = choose_device(str(device)), Path(path)
    return read_while_training(where, lambda: read(*locate_model(where, checkpoint), place))


def save_model(model: HGRN2LM, folder: str | Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write a model into a new folder, which appears complete or not at all.

    Args:
        model: the model.
        folder: the new folder; must not exist.
        tokenizer: its tokenizer, written too if given.

    Returns:
        The folder.

    Raises:
        UserError: the folder exists or cannot be written, or the tokenizer has more tokens than the model.
        MissingPackage: a package of the extra "train" is not installed.
    """
    with _needs_extra("HGRN2LM.save"):
        from hgrn2.formats.convert import convert
    if not isinstance(folder, str | Path) or not str(folder):
        raise UserError(f"folder is {describe(folder)}; wanted the name of a new folder")
    with tempfile.TemporaryDirectory() as beside:
        if tokenizer is not None:
            tokenizer.check_fits(model.config.vocab_size)
            tokenizer.save(Path(beside))
        return convert(_InMemory.of(model, Path(folder)), Path(folder), "native", tokenizer_dir=Path(beside)).path


@dataclass(frozen=True)
class _InMemory:
    """A model in memory as a source for `hgrn2.formats.convert.convert`."""

    path: Path
    config: HGRN2Config
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: HGRN2LM, path: Path) -> _InMemory:
        return cls(path, model.config, {name: x.detach() for name, x in model.named_parameters()})

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def spec(self, name: str) -> Tensor:
        return self.tensors[name].to("meta")

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@contextmanager
def _needs_extra(what: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "hgrn2":
            raise
        name = (missing.name or "a package").partition(".")[0]
        error = MissingPackage(f"{what} needs {name}, which is not installed: {install_command('train')}")
        error.name = missing.name
        raise error from None
