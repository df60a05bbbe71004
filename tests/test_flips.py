"""Single bits flipped in any file of a run, a prepared set or a state file: refused in one line, or without effect.

Many more of them than the test takes:

    python -m tests.test_flips --flips 1000 --seed 7
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import random
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hgrn2.data.prepare import prepare
from hgrn2.data.prepared import PreparedData
from hgrn2.errors import UserError
from hgrn2.formats.run_folder import checkpoints_of
from hgrn2.inference.writing import Sampling, Writer
from hgrn2.loading import load
from hgrn2.models import HGRN2Config
from hgrn2.train.checkpoint import load_checkpoint
from hgrn2.train.gates import GateSummary
from hgrn2.train.metrics import read_metrics
from hgrn2.train.run_data import open_prepared
from hgrn2.train.runs import resume_language_run, start_language_run

SETTINGS = {
    "max_steps": 4, "batch_size": 2, "seq_len": 16, "validation_every": 2, "checkpoint_every": 2, "sample_every": 2,
    "validation_tokens": 200, "device": "cpu",
}  # fmt: skip


def make(folder: Path) -> None:
    """A run, the tokens it was trained on and a state file, as the command line leaves them."""
    texts = folder / "texts"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i}.txt").write_text(f"a small text, number {i}\n" * (2 + i % 3), encoding="utf-8")
    data = prepare(texts, "bpe:270", folder / "prepared", shard_tokens=300, progress=False)
    config = HGRN2Config(
        vocab_size=data.tokenizer.vocab_size, hidden_size=16, num_hidden_layers=2, expand_ratio=8, intermediate_size=16
    )
    start_language_run(folder / "run", config, SETTINGS, data, data_settings={}, sampler=lambda *_: "a sample")
    writer = Writer(*load(folder / "run", "latest", "cpu"), Sampling(temperature=0))
    "".join(writer.write("a small", 5))
    writer.save_state(folder / "state")


def use(folder: Path) -> dict[str, Any]:
    """Everything that depends on the files, by what was done; a UserError or a warning where it was refused."""
    run = folder / "run"
    acts = {
        "model": lambda: _load(run),
        "tokens": lambda: _read_tokens(PreparedData.open(folder / "prepared")),
        "metrics": lambda: [_without_times(record) for record in read_metrics(run)],
        "gates": lambda: {name: array.tobytes() for name, array in vars(GateSummary.load(run)).items()},
        "state": lambda: _go_on(folder),
        # each one, for any of them may be named; last, as it changes the run
        **{path.name: lambda path=path: _tensors_of(load_checkpoint(path)) for path in checkpoints_of(run)},
        "resume": lambda: _resume(run),
    }
    return {name: _outcome(act) for name, act in acts.items()}


def _outcome(act: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return act()
        except (UserError, UserWarning) as error:
            if "\n" in str(error):
                raise RuntimeError(f"more than a line: {error}") from error
            return error


def _load(run: Path) -> Any:
    model, tokenizer = load(run, "latest", "cpu")
    return tokenizer.fingerprint(), _hash(dict(model.named_parameters()))


def _hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors_of(checkpoint: Any) -> Any:
    return checkpoint.state, [_hash(part) for part in (checkpoint.model, checkpoint.optimizer, checkpoint.task)]


def _read_tokens(data: PreparedData) -> Any:
    sides = [data.train, data.validation]
    return data.summary(), [
        (side.tokens(0, side.num_tokens).tobytes(), side.document_starts.tobytes(), side.piece_bytes.tobytes(),
         side.eot_id, side.vocab_size)
        for side in sides
    ]  # fmt: skip


def _without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("elapsed_s", "tokens_per_s", "memory_bytes")}


def _go_on(folder: Path) -> str:
    writer = Writer(*load(folder / "run", "latest", "cpu"), Sampling(temperature=0))
    writer.load_state(folder / "state")
    return "".join(writer.write("", 8))


def _resume(run: Path) -> Any:
    # drawing takes longer than all the rest, and nobody reads pictures back
    drawing = mock.patch("hgrn2.train.plots.plot_run", return_value=[])
    with drawing, contextlib.redirect_stderr(io.StringIO()) as shown:
        found = resume_language_run(run, open_prepared(run), changes={"max_steps": 6}, sampler=lambda *_: "a sample")
    # also what it says
    notes = [line for line in shown.getvalue().splitlines() if line.startswith(("settings", "the learning", "metrics"))]
    return notes, [_without_times(record) for record in read_metrics(run)], _hash(dict(found.model.named_parameters()))


def flip(original: Path, wanted: dict[str, Any], generator: random.Random) -> tuple[str, str]:
    """Flip one bit of a random file of a copy, use it, and say what came of it."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = shutil.copytree(original, Path(scratch, "copy"))
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "texts")
        path = generator.choice([path for path in files if path.stat().st_size])
        data = bytearray(path.read_bytes())
        place, bit = generator.randrange(len(data)), generator.randrange(8)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        where = f"{path.relative_to(folder)}, byte {place}, bit {bit}"
        try:
            found = use(folder)
        except Exception as error:
            return where, f"traceback: {type(error).__name__}: {error}"
    refused = [name for name, value in found.items() if isinstance(value, Exception)]
    silent = [name for name, value in found.items() if name not in refused and value != wanted[name]]
    # where one use names the damage, what the others make of it may differ no less
    return where, f"silent: {silent}" if silent else "refused" if refused else "harmless"


def campaign(num_flips: int, seed: int) -> Counter[str]:
    """Flip many bits, one at a time; print those that are neither refused nor harmless."""
    generator, outcomes = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        original = Path(scratch, "original")
        original.mkdir()
        with contextlib.redirect_stderr(io.StringIO()):
            make(original)
            copy = shutil.copytree(original, Path(scratch, "copy"))
            wanted = use(copy)
        assert not [value for value in wanted.values() if isinstance(value, Exception)], wanted
        for _ in range(num_flips):
            with contextlib.redirect_stderr(io.StringIO()):
                where, outcome = flip(original, wanted, generator)
            outcomes[outcome.partition(":")[0]] += 1
            if outcome not in ("refused", "harmless"):
                print(f"seed {seed}: {where}: {outcome}")
    return outcomes


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_flipped_bits_are_refused_or_harmless():
    seed = random.randrange(2**32)
    print(f"bits drawn with seed {seed}")
    outcomes = campaign(16, seed)
    assert set(outcomes) <= {"refused", "harmless"}, outcomes
    assert outcomes["refused"] > 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {given.seed}: {dict(campaign(given.flips, given.seed))}")
