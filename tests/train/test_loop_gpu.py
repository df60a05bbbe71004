"""The loop on a GPU: it reads a step's loss after the next step is on its way, and records the same."""

from __future__ import annotations

import pytest
import torch

from hgrn2.formats import run_folder
from hgrn2.storage.lock import run_lock
from hgrn2.train import checkpoint, optim
from hgrn2.train import run as run_module
from hgrn2.train.config import TrainConfig
from hgrn2.train.display import PlainDisplay
from hgrn2.train.loop import Trainer
from hgrn2.train.metrics import read_metrics
from tests.train.tiny_run import ROLES, TinyModel, TinyTask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class GPUTask(TinyTask):
    """TinyTask with its batches on the GPU."""

    def next_batch(self):
        ids, targets, position = super().next_batch()
        return ids.cuda(), targets.cuda(), position

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.carried = self.carried.cuda()


def run(run_dir, config, **task_settings):
    resume_from = None
    with run_lock(run_dir) as check_lock:
        if (run_dir / "config.json").exists():
            run_dir, resume_from = run_folder.resume_point(run_dir)
        else:
            checkpoint.create_run(run_dir, {"train": config.to_dict()})
        torch.manual_seed(0)
        trainer = Trainer(
            model=TinyModel(dropout=0.0).cuda(), task=GPUTask(config, **task_settings), roles=ROLES, config=config,
            run_dir=run_dir, run_config={"train": config.to_dict()}, resume_from=resume_from, display=PlainDisplay(),
            check_lock=check_lock,
        )  # fmt: skip
        return trainer.run()


def records(run_dir):
    keys = ("step", "tokens", "loss", "grad_norm", "learning_rate", "smoothed_loss", "skipped_steps", "val_loss")
    return [[r.get(k) for k in keys] for r in read_metrics(run_dir) if r["kind"] in ("train", "validation")]


SETTINGS = {"max_steps": 12, "batch_size": 4, "learning_rate": 0.01, "validation_every": 5}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad_batches", [(), (3, 4, 9)])
def test_records_are_those_of_a_loop_that_waits(bad_batches, precision, tmp_path, monkeypatch, capsys):
    config = TrainConfig(**SETTINGS, checkpoint_every=4, precision=precision)
    run(tmp_path / "fast", config, bad_batches=bad_batches)
    # the update on the device is a kernel of Triton
    monkeypatch.setattr(optim, "triton_runs", lambda *dtypes: False)
    run(tmp_path / "waiting", config, bad_batches=bad_batches)
    fast, waiting = records(tmp_path / "fast"), records(tmp_path / "waiting")
    assert len(fast) == len(waiting)
    for found, wanted in zip(fast, waiting, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5 if precision == "float32" else 1e-3)
    # checkpoints hold float32 weights
    saved = [checkpoint.load_checkpoint(run_folder.resume_point(tmp_path / name)[1]) for name in ("fast", "waiting")]
    for name, weight in saved[0].model.items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, saved[1].model[name], rtol=1e-2, atol=1e-3)


def test_a_resumed_run_records_the_same(tmp_path, capsys):
    config = TrainConfig(**SETTINGS, checkpoint_every=4)
    run(tmp_path / "whole", config)
    short = TrainConfig(**(SETTINGS | {"max_steps": 8}), schedule="constant", checkpoint_every=4)
    whole = TrainConfig(**SETTINGS, schedule="constant", checkpoint_every=4)
    run(tmp_path / "parts", short)
    run(tmp_path / "parts", whole)
    run(tmp_path / "one", whole)
    last = [records(tmp_path / name)[-1] for name in ("parts", "one")]
    assert last[0] == pytest.approx(last[1], rel=1e-5)


def test_too_many_steps_that_are_not_finite_stop_the_run(tmp_path, capsys):
    from hgrn2.errors import UserError

    config = TrainConfig(**SETTINGS, max_nonfinite=3)
    with pytest.raises(UserError, match="not finite in 3 steps in a row"):
        run(tmp_path / "bad", config, bad_batches=tuple(range(4, 12)))
    skipped = [r["step"] for r in read_metrics(tmp_path / "bad") if r["kind"] == "train" and r["loss"] is None]
    assert skipped == [5, 6, 7]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    pytest.importorskip("numpy")
    from hgrn2.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    # documents of several lengths, so that batches hold several numbers of sequences
    lines = ["the quick brown fox " * (1 + i % 40) for i in range(300)]
    for i, line in enumerate(lines):
        (folder / f"{i}.txt").write_text(line + str(i))
    return prepare([str(folder / "*.txt")], "bytes", folder / "prepared")


def train_language(run_dir, prepared, **settings):
    from hgrn2.models import presets
    from hgrn2.train.runs import resume_language_run, start_language_run

    torch.compiler.reset()
    model = presets.tiny(vocab_size=300, hidden_size=256, num_hidden_layers=3, expand_ratio=128, dropout=0.1)
    base = {
        "max_steps": 30, "batch_size": 4, "seq_len": 512, "learning_rate": 0.003, "validation_every": 12,
        "checkpoint_every": 10, "precision": "bfloat16", "validation_tokens": 2048, "schedule": "constant",
        "warmup_steps": 2,
    }  # fmt: skip
    if run_dir.exists():
        return resume_language_run(run_dir, prepared, changes=settings, display=PlainDisplay())
    return start_language_run(run_dir, model, base | settings, prepared, data_settings={}, display=PlainDisplay())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_steps_record_what_launched_ones_do(precision, compile, prepared, tmp_path, capsys):
    for name, cuda_graph in (("launched", False), ("captured", True)):
        train_language(tmp_path / name, prepared, cuda_graph=cuda_graph, precision=precision, compile=compile)
    launched, captured = records(tmp_path / "launched"), records(tmp_path / "captured")
    assert len(launched) == len(captured) > 30
    for found, wanted in zip(captured, launched, strict=True):
        # dropout draws the same numbers, and sums are in the same order up to the update
        assert found == pytest.approx(wanted, rel=2e-2 if precision == "bfloat16" else 1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_captured_run_is_resumed(prepared, tmp_path, capsys):
    train_language(tmp_path / "whole", prepared, cuda_graph=True)
    train_language(tmp_path / "parts", prepared, cuda_graph=True, max_steps=20)
    train_language(tmp_path / "parts", prepared, max_steps=30)
    whole, parts = records(tmp_path / "whole"), records(tmp_path / "parts")
    assert parts[-1] == pytest.approx(whole[-1], rel=2e-2)


@pytest.mark.filterwarnings("ignore")
def test_the_first_step_compiles_nothing(prepared, tmp_path, monkeypatch, capsys):
    # what the shallow model compiled is used by every layer of the model
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []

    class Watched(run_module.Trainer):
        def run(self):
            graphs.append(counters["unique_graphs"])
            return super().run()

    monkeypatch.setattr(run_module, "Trainer", Watched)
    counters.clear()
    train_language(tmp_path / "run", prepared, compile=True, max_steps=1)
    assert graphs[0] > 0
    assert counters["unique_graphs"] == graphs[0]
    torch.compiler.reset()
