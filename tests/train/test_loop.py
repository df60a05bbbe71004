import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from hgrn2.errors import UserError
from hgrn2.formats import run_folder
from hgrn2.train import checkpoint, run_clock
from hgrn2.train.config import TrainConfig
from hgrn2.train.loop import Trainer
from hgrn2.train.metrics import read_metrics
from tests.refusals import refuses
from tests.train.tiny_run import ROLES, TinyModel, TinyTask, losses, run, saved_tensors

SETTINGS = {
    "max_steps": 30,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "validation_every": 8,
    "checkpoint_every": 5,
    "sample_every": 6,
}


class Listener:
    """A display that remembers, and may act."""

    def __init__(self, at_step=None):
        self.notes, self.at_step = [], at_step or (lambda step: None)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def train(self, record, progress, eta_s):
        assert 0 <= progress <= 1
        self.at_step(record["step"])

    def validation(self, record):
        pass

    def sample(self, record):
        pass

    def note(self, text):
        self.notes.append(text)


def kinds(run_dir, kind):
    return [r for r in read_metrics(run_dir) if r["kind"] == kind]


def test_a_run_leaves_records_and_checkpoints(tmp_path):
    result = run(tmp_path / "run", SETTINGS, display=Listener())
    steps = [r["step"] for r in kinds(result.run_dir, "train")]
    assert steps == list(range(1, 31))
    assert [r["step"] for r in kinds(result.run_dir, "validation")] == [8, 16, 24, 30]
    assert [r["step"] for r in kinds(result.run_dir, "sample")] == [6, 12, 18, 24, 30]
    assert result.last_validation["step"] == 30
    assert result.stopped_by is None
    assert result.checkpoint.name == "step-00000030"
    assert result.counters.tokens == 30 * 4 * 16
    first, last = (kinds(result.run_dir, "train")[i]["loss"] for i in (0, -1))
    assert last < 0.9 * first
    # the same draws for every sample: they compare
    assert len({r["text"] for r in kinds(result.run_dir, "sample")}) == 1


def test_looking_does_not_change_the_training(tmp_path):
    run(tmp_path / "often", SETTINGS | {"validation_every": 1, "sample_every": 1}, display=Listener())
    run(tmp_path / "never", SETTINGS | {"validation_every": 0, "sample_every": 0}, display=Listener())
    often, never = ([r["loss"] for r in kinds(tmp_path / n, "train")] for n in ("often", "never"))
    assert often == never
    assert [r["step"] for r in kinds(tmp_path / "never", "validation")] == [30]


@pytest.mark.parametrize("ragged", [False, True])
def test_accumulation_equals_the_big_batch(tmp_path, ragged):
    """Every target weighs the same, also when the batches hold different numbers of them."""

    class Halved(TinyTask):
        """The big task's batch, cut in two unequal parts."""

        def next_batch(self):
            if self.position % 2 == 0:
                self.whole = super().next_batch()
                self.position -= 1
            part = slice(0, 3) if self.position % 2 == 0 else slice(3, 4)
            self.position += 1
            return self.whole[0][part], self.whole[1][part], 0

    class Whole(TinyTask):
        def next_batch(self):
            batch = super().next_batch()
            self.position += 1
            return batch

    found = []
    for name, kind, accumulation in (("whole", Whole, 1), ("halved", Halved, 2)):
        config = TrainConfig.from_dict(SETTINGS | {"grad_accumulation": accumulation, "batch_size": 4})
        checkpoint.create_run(tmp_path / name, {})
        torch.manual_seed(0)
        task = kind(config, ragged=ragged)
        model = TinyModel(dropout=0.0).double()
        Trainer(model, task, ROLES, config, tmp_path / name, {}, display=Listener()).run()
        assert task.position == 60
        found.append([(r["loss"], r["grad_norm"]) for r in kinds(tmp_path / name, "train")])
    for whole, halved in zip(*found, strict=True):
        assert halved == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("bad", [(4,), (4, 5, 9)])
def test_nonfinite_steps_are_skipped_and_counted(tmp_path, bad):
    listener = Listener()
    result = run(tmp_path / "run", SETTINGS, task_settings={"bad_batches": bad}, display=listener)
    records = kinds(result.run_dir, "train")
    assert [r["step"] - 1 for r in records if r["loss"] is None] == list(bad)
    assert records[-1]["skipped_steps"] == result.counters.skipped_steps == len(bad)
    assert sum("skipped: its loss is not finite" in note for note in listener.notes) == len(bad)
    assert all(math.isfinite(r["loss"]) for r in records if r["step"] - 1 not in bad)


def test_a_skipped_step_changes_no_parameter(tmp_path):
    config = TrainConfig.from_dict(SETTINGS | {"max_steps": 1, "warmup_steps": 0})
    checkpoint.create_run(tmp_path / "run", {})
    model, task = TinyModel(), TinyTask(config, bad_batches=(0,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Trainer(model, task, ROLES, config, tmp_path / "run", {}, display=Listener()).run()
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert task.num_forgotten == 1


def test_too_many_nonfinite_steps_in_a_row_stop_the_run(tmp_path):
    settings = SETTINGS | {"max_nonfinite": 3}
    bad = {"bad_batches": (2, 3, 12, 13, 14)}
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", settings, task_settings=bad, display=Listener())
    message = str(caught.value)
    assert "stopped at step 15, the loss was not finite in 3 steps in a row" in message
    assert f"last good checkpoint: {tmp_path / 'run' / 'checkpoints' / 'step-00000010'}" in message
    assert "\n" not in message
    assert all(
        t.isfinite().all() for t in saved_tensors(tmp_path / "run").values()
    )  # fmt: skip


@pytest.mark.parametrize("bad", [(5, 6), (4, 5)])
def test_no_periodic_checkpoint_while_steps_are_skipped(tmp_path, bad):
    """The step before the first that is skipped may have spoilt the weights: the older checkpoints are worth more."""
    settings = SETTINGS | {"max_steps": 9, "checkpoint_every": 1, "validation_every": 0, "keep_last": 100}
    result = run(tmp_path / "run", settings, task_settings={"bad_batches": bad}, display=Listener())
    steps = [int(path.name[5:]) for path in run_folder.checkpoints_of(result.run_dir)]
    assert steps == [step for step in range(1, 10) if step - 1 not in bad]


def test_a_sampler_that_fails_is_a_note(tmp_path):
    class Speechless(TinyTask):
        def sample(self, model):
            raise UserError("the model's outputs are not finite")

    listener = Listener()
    config = TrainConfig.from_dict(SETTINGS | {"max_steps": 6})
    checkpoint.create_run(tmp_path / "run", {})
    Trainer(TinyModel(), Speechless(config), ROLES, config, tmp_path / "run", {}, display=listener).run()
    assert run_folder.checkpoints_of(tmp_path / "run")[-1].name == "step-00000006"
    assert listener.notes == ["step 6: no sample (the model's outputs are not finite)"]
    assert [r["step"] for r in kinds(tmp_path / "run", "validation")] == [6]


def test_what_cannot_go_on_leaves_the_later_checkpoints(tmp_path, monkeypatch):
    run(tmp_path / "run", SETTINGS | {"keep_last": 100}, display=Listener())
    before = run_folder.checkpoints_of(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = TrainConfig.from_dict(SETTINGS | {"tensorboard": True})
    with refuses("unavailable", "tensorboard"):
        Trainer(TinyModel(), TinyTask(config), ROLES, config, tmp_path / "run", {}, before[0], display=Listener()).run()
    assert run_folder.checkpoints_of(tmp_path / "run") == before


def test_a_nonfinite_gradient_of_a_finite_loss_is_skipped(tmp_path):
    class Infinite(TinyTask):
        def loss(self, model, batch):
            # d sqrt(x) at 0 is infinite, its value is not
            extra = (model.head.weight[0, 0] * 0.0).sqrt() if batch[2] == 3 else 0.0
            return super().loss(model, batch) + extra

    config = TrainConfig.from_dict(SETTINGS)
    checkpoint.create_run(tmp_path / "run", {})
    listener = Listener()
    Trainer(TinyModel(), Infinite(config), ROLES, config, tmp_path / "run", {}, display=listener).run()
    record = kinds(tmp_path / "run", "train")[3]
    assert record["loss"] is not None
    assert record["grad_norm"] is None
    assert record["skipped_steps"] == 1
    assert any("its gradient is not finite" in note for note in listener.notes)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_from_every_checkpoint_gives_the_same_losses(tmp_path, optimizer):
    settings = SETTINGS | {"optimizer": optimizer, "keep_last": 100, "grad_accumulation": 2}
    run(tmp_path / "run", settings, display=Listener())
    wanted = losses(tmp_path / "run")
    found = run_folder.checkpoints_of(tmp_path / "run")
    assert len(found) >= 6
    for path in reversed(found):
        config = TrainConfig.from_dict(settings)
        torch.manual_seed(99)
        model = TinyModel()
        Trainer(
            model, TinyTask(config), ROLES, config, tmp_path / "run", {}, resume_from=path, display=Listener()
        ).run()
        assert losses(tmp_path / "run") == wanted, path.name


def test_a_finished_run_resumes_to_its_end(tmp_path):
    run(tmp_path / "run", SETTINGS, display=Listener())
    wanted = losses(tmp_path / "run")
    result = run(tmp_path / "run", SETTINGS, display=Listener())
    assert losses(tmp_path / "run") == wanted
    assert result.counters.step == 30


def test_the_best_checkpoint_is_kept(tmp_path):
    class Worsening(TinyTask):
        def evaluate(self, model):
            return {"val_loss": abs(self.position - 16) + 1.0}

    config = TrainConfig.from_dict(SETTINGS | {"keep_last": 1})
    checkpoint.create_run(tmp_path / "run", {})
    result = Trainer(TinyModel(), Worsening(config), ROLES, config, tmp_path / "run", {}, display=Listener()).run()
    assert result.counters.best == {"step": 16, "val_loss": 1.0}
    assert [p.name for p in run_folder.checkpoints_of(result.run_dir)] == ["step-00000016", "step-00000030"]
    assert run_folder.locate_model(result.run_dir, "best")[0].name == "step-00000016"


@pytest.mark.parametrize(
    ("budget", "num_steps"), [({"max_tokens": 20 * 64 + 1}, 21), ({"max_tokens": 10_000, "max_steps": 7}, 7)]
)
def test_budgets(tmp_path, budget, num_steps):
    settings = {k: v for k, v in SETTINGS.items() if k != "max_steps"} | budget
    assert run(tmp_path / "run", settings, display=Listener()).counters.step == num_steps


def test_time_budget(tmp_path, monkeypatch):
    # a clock that advances by 0.01 s whenever it is read
    clock = itertools.count()
    monkeypatch.setattr(run_clock, "time", SimpleNamespace(monotonic=lambda: 0.01 * next(clock)))
    settings = {k: v for k, v in SETTINGS.items() if k != "max_steps"} | {
        "max_time_s": 2.0,
        "checkpoint_every": 0,
    }
    result = run(tmp_path / "run", settings, display=Listener())
    assert 10 < result.counters.step < 100
    assert 2.0 <= result.counters.elapsed_s < 2.2
    last = kinds(tmp_path / "run", "train")[-1]
    assert last["learning_rate"] < 0.5 * 1e-2


def test_bfloat16_follows_float32(tmp_path):
    for precision in ("float32", "bfloat16"):
        run(tmp_path / precision, SETTINGS | {"precision": precision}, display=Listener())
    full, half = (kinds(tmp_path / p, "train") for p in ("float32", "bfloat16"))
    assert [r["loss"] for r in full] != [r["loss"] for r in half]
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.02)
    saved = saved_tensors(tmp_path / "bfloat16")
    assert {t.dtype for t in saved.values()} == {torch.float32}


def test_clipping_bounds_the_gradient(tmp_path, monkeypatch):
    applied = []
    original = torch.nn.utils.clip_grads_with_norm_

    def spy(parameters, max_norm, norm):
        original(parameters, max_norm, norm)
        applied.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item())

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", spy)
    run(tmp_path / "run", SETTINGS | {"clip_norm": 0.1, "max_steps": 5}, display=Listener())
    recorded = [r["grad_norm"] for r in kinds(tmp_path / "run", "train")]
    assert all(norm > 0.1 for norm in recorded)
    assert applied == pytest.approx([0.1] * 5, rel=1e-4)


def test_full_disk_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    wanted = tmp_path / "wanted"
    run(wanted, SETTINGS, display=Listener())
    original = checkpoint.write_safetensors

    def full(path, tensors):
        if "step-00000020" in str(path) and path.name == "optimizer.safetensors":
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return original(path, tensors)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(UserError) as caught:
        run(tmp_path / "run", SETTINGS, display=Listener())
    message = str(caught.value)
    assert "No space left on device at step 20" in message
    assert "step-00000016" in message
    assert f"hgrn2 train --resume {tmp_path / 'run'}" in message
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
    monkeypatch.undo()
    run(tmp_path / "run", SETTINGS, display=Listener())
    assert losses(tmp_path / "run") == losses(wanted)


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def denied(path, tensors):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "write_safetensors", denied)
    with pytest.raises(PermissionError):
        run(tmp_path / "run", SETTINGS, display=Listener())


def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    refused = []

    def intrude(step):
        if step == 12:
            half = run_dir / "checkpoints" / ".tmp-step-00000015"
            half.mkdir()
            with refuses("in-use", run_dir) as caught:
                run(run_dir, SETTINGS | {"learning_rate": 1.0}, display=Listener())
            refused.append(str(caught.value))
            # as far as the intruder knows, the first process is writing there
            half.rmdir()

    result = run(run_dir, SETTINGS, display=Listener(intrude))
    assert len(refused) == 1
    assert result.counters.step == 30
    assert run(run_dir, SETTINGS, display=Listener()).counters.step == 30


def test_leftovers_are_gone_when_a_run_goes_on(tmp_path):
    run(tmp_path / "run", SETTINGS | {"max_steps": 5}, display=Listener())
    left = tmp_path / "run" / "checkpoints" / ".tmp-step-00000004"
    left.mkdir()
    run(tmp_path / "run", SETTINGS | {"max_steps": 5}, display=Listener())
    assert not left.exists()
