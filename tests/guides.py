"""The Python of a guide, and what its reader is supposed to have at hand when it runs."""

from __future__ import annotations

import re
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hgrn2.cli import main
from hgrn2.data import train_bpe
from hgrn2.models import HGRN2LM, presets
from hgrn2.train.checkpoint import CheckpointStore, create_run, model_tensors

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
IMPORT = re.compile(r"^(from \S+ )?import ", re.MULTILINE)


def python_blocks(path: Path) -> list[str]:
    return [text for language, text in FENCE.findall(path.read_text(encoding="utf-8")) if language == "python"]


def unmarked_python(path: Path) -> list[str]:
    """Blocks that no test would run: Python by its imports, but not marked as such."""
    blocks = FENCE.findall(path.read_text(encoding="utf-8"))
    return [text for language, text in blocks if language != "python" and IMPORT.search(text)]


def run_blocks(path: Path) -> dict[str, Any]:
    """Runs a guide's blocks as they are printed, one after the other; returns the names that they leave."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in python_blocks(path):
        exec(compile(block, str(path), "exec"), names)
    return names


def make_run(folder: Path, data: dict[str, Any] | None = None) -> None:
    """A run with two checkpoints, of a model that was not trained."""
    tokenizer = train_bpe(["Once upon a time it rained, and then it stopped again"], 270)
    config = presets.variant(
        "fla",
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        expand_ratio=8,
        intermediate_size=24,
    )
    settings = {"model": config.to_dict(), "train": {}, "data": data or {}}
    create_run(folder, settings, tokenizer)
    store = CheckpointStore(folder, 2)
    for step in (1, 2):
        state = {"step": step, "best": {"step": 1}}
        store.save(
            model=model_tensors(HGRN2LM(config)), optimizer={}, task={}, state=state, config=settings, best_step=1
        )


def small_standard_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all of it would take a minute."""
    whole = Path(sysconfig.get_paths()["stdlib"])
    some = Path("some").absolute()
    for name in ("os.py", "json", "email", "logging", "argparse.py", "typing.py", "ast.py", "inspect.py"):
        copy = shutil.copytree if (whole / name).is_dir() else shutil.copyfile
        some.mkdir(exist_ok=True)
        copy(whole / name, some / name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(some)})


def exporter_to_onnx(_: pytest.MonkeyPatch) -> None:
    """Import its packages, or skip the test; torch's exporter warns about itself."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", "# .*", UserWarning)


def make_run_and_convert(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of the tutorial, and the folder it is converted to."""
    make_run(Path("runs/notes"))
    assert main(["convert", "runs/notes", "notes-model", "--to", "hf"]) == 0


# what lies in the folder where a guide's blocks run; those that are not named need nothing
SETUPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "using.md": lambda _: make_run(Path("runs/RUN")),
    "data.md": small_standard_library,
    "export.md": exporter_to_onnx,
    "tutorial.md": make_run_and_convert,
}
