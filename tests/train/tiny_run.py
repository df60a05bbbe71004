"""A run small enough to be killed many times: a stand-in model with dropout, and a task without files."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from hgrn2.data.prepared import PreparedData
from hgrn2.errors import UserError
from hgrn2.formats import run_folder
from hgrn2.models import HGRN2Config
from hgrn2.storage.lock import run_lock
from hgrn2.tasks.base import Metric, TaskBase
from hgrn2.train import checkpoint
from hgrn2.train.config import TrainConfig
from hgrn2.train.display import PlainDisplay
from hgrn2.train.loop import Trainer
from hgrn2.train.metrics import read_metrics
from hgrn2.train.result import TrainResult
from hgrn2.train.runs import resume_language_run, start_language_run

SEQ_LEN = 16

ROLES = {
    "embedding.weight": "embedding",
    "hidden.weight": "matrix",
    "norm.weight": "vector",
    "norm.bias": "vector",
    "lower_bounds": "lower_bounds",
    "head.weight": "head",
}


def saved_tensors(path: Path, which: str = "latest") -> dict[str, torch.Tensor]:
    """The weights of a run, a checkpoint, or another folder with a model."""
    folder, _ = run_folder.locate_model(path, which)
    return load_file(folder / checkpoint.MODEL_NAME)


class TinyModel(nn.Module):
    """Predicts a token from the one before it."""

    def __init__(self, vocab_size: int = 17, hidden_size: int = 8, dropout: float = 0.1):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.hidden = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size)
        self.lower_bounds = nn.Parameter(torch.zeros(hidden_size))
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids):
        x = self.dropout(self.embedding(ids))
        return self.head(self.norm(x + self.lower_bounds.sigmoid() * self.hidden(x)))


class TinyTask(TaskBase):
    """Batches from a counter, a carried tensor, and values that can be spoilt at chosen batches."""

    name = "tiny"
    metric = Metric("val_loss")

    def __init__(self, config: TrainConfig, bad_batches: tuple[int, ...] = (), ragged: bool = False):
        self.config, self.bad_batches, self.ragged = config, bad_batches, ragged
        self.position = 0
        self.carried = torch.zeros(3)
        self.num_forgotten = 0

    def next_batch(self):
        generator = torch.Generator().manual_seed(self.position)
        ids = torch.randint(17, (self.config.batch_size, SEQ_LEN + 1), generator=generator)
        # a pattern to learn
        ids[:, 1::2] = (ids[:, 0:-1:2] + 3) % 17
        targets = ids[:, 1:].clone()
        if self.ragged:
            targets[:, : 2 + self.position % 3] = -100
        batch = (ids[:, :-1], targets, self.position)
        self.position += 1
        return batch

    def num_tokens(self, batch):
        return batch[0].numel()

    def num_targets(self, batch):
        return int((batch[1] != -100).sum())

    def loss(self, model, batch):
        ids, targets, position = batch
        self.carried = self.carried + 1.0
        loss = F.cross_entropy(model(ids).flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return loss * float("nan") if position in self.bad_batches else loss + 0.0 * self.carried.sum()

    def step_skipped(self):
        self.num_forgotten += 1

    def evaluate(self, model):
        # draws from the global generator on purpose: it must not be felt by the training
        torch.rand(5)
        position, self.position = self.position, 10**6
        with torch.no_grad():
            batch = self.next_batch()
            val_loss = self.loss(model, batch).item() / self.num_targets(batch)
        self.position, self.carried = position, self.carried - 1.0
        return {"val_loss": val_loss}

    def sample(self, model):
        return f"a sample {torch.rand(()).item():.3f}"

    def state_dict(self):
        return {"position": self.position}

    def state_tensors(self):
        return {"carried": self.carried}

    def load_state(self, state, tensors):
        self.position, self.carried = state["position"], tensors["carried"]


def run(run_dir: Path, settings: dict, *, task_settings: dict | None = None, display=None) -> TrainResult:
    """Start the run, or go on with it if the folder holds one."""
    torch.set_num_threads(1)
    config = TrainConfig.from_dict(settings)
    task = TinyTask(config, **(task_settings or {}))
    resume_from = None
    with run_lock(run_dir) as check_lock:
        if (run_dir / "config.json").exists():
            run_dir, resume_from = run_folder.resume_point(run_dir)
        else:
            checkpoint.create_run(run_dir, {"train": config.to_dict()})
        torch.manual_seed(config.seed)
        trainer = Trainer(
            model=TinyModel(),
            task=task,
            roles=ROLES,
            config=config,
            run_dir=run_dir,
            run_config=run_folder.read_config(run_dir),
            resume_from=resume_from,
            display=display or PlainDisplay(),
            check_lock=check_lock,
        )
        return trainer.run()


class SelfSignalling(PlainDisplay):
    """Sends the own process signals when a step is done, so that nobody has to hit the moment from outside."""

    def __init__(self, step: int, numbers: Sequence[int]) -> None:
        super().__init__()
        self._step, self._numbers = step, numbers

    def train(self, record: dict, progress: float, eta_s: float | None) -> None:
        if record["step"] == self._step:
            for number in self._numbers:
                os.kill(os.getpid(), number)


def run_until_signals(run_dir: Path, settings: dict, step: int, numbers: Sequence[int]) -> None:
    """Run, and get signals after a step."""
    run(run_dir, settings, display=SelfSignalling(step, numbers))


def run_in_a_terminal_until_signals(run_dir: Path, settings: dict, step: int, numbers: Sequence[int]) -> None:
    """Run until signals, with SIGHUP as a terminal has it, even if the tests were started under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        run_until_signals(run_dir, settings, step, numbers)
    finally:
        signal.signal(signal.SIGHUP, before)


def run_with_file_limit(run_dir: Path, settings: dict, limit_bytes: int) -> None:
    """Run where no file can grow beyond a limit; leaves the user's error in run_dir.error."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        run(run_dir, settings)
    except UserError as error:
        cause = error.__cause__
        found = {"text": str(error), "errno": cause.errno if isinstance(cause, OSError) else None}
        run_dir.with_suffix(".error").write_text(json.dumps(found))


def run_language(run_dir: Path, settings: dict, data_dir: Path) -> None:
    """Start or resume a run of the real model on prepared data, with dropout."""
    torch.set_num_threads(1)
    data = PreparedData.open(data_dir)
    if (run_dir / "config.json").exists():
        resume_language_run(run_dir, data, display=PlainDisplay())
        return
    model_config = HGRN2Config(
        vocab_size=257, hidden_size=16, num_hidden_layers=2, expand_ratio=8, intermediate_size=24, dropout=0.1
    )
    start_language_run(run_dir, model_config, settings, data, data_settings={}, display=PlainDisplay())


def losses(run_dir: Path) -> list[tuple]:
    """Values that must be equal to the last bit: step, loss, gradient norm and learning rate of every step."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "smoothed_loss", "val_loss")
    return [tuple(r.get(k) for k in keys) for r in read_metrics(run_dir) if r["kind"] in ("train", "validation")]
