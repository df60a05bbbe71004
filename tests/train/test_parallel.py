"""The seam for several processes: ranks that are threads here give the losses of one process with all the data."""

import threading

import pytest
import torch

from hgrn2.errors import UserError
from hgrn2.formats import run_folder
from hgrn2.storage.lock import run_lock
from hgrn2.tasks.base import StepLoss
from hgrn2.train import checkpoint
from hgrn2.train.config import TrainConfig
from hgrn2.train.display import PlainDisplay
from hgrn2.train.loop import Trainer
from hgrn2.train.metrics import read_metrics
from hgrn2.train.parallel import ONE_PROCESS, OneProcess, Parallel
from tests.train.tiny_run import ROLES, TinyModel, TinyTask

RANKS = 2
SETTINGS = {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 1, "validation_every": 3}


class Shared:
    """Values that ranks exchange: one each, between two barriers."""

    def __init__(self):
        self.barrier = threading.Barrier(RANKS, timeout=60)
        self.values = [None] * RANKS

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        found = list(self.values)
        self.barrier.wait()
        return found


class Thread(OneProcess):
    """A rank that is a thread, with a model of its own."""

    def __init__(self, rank, shared):
        self.rank, self.shared, self.is_main = rank, shared, rank == 0

    def exchange(self, value):
        return self.shared.exchange(self.rank, value)

    def prepare(self, model, task=None, config=None):
        self.model = model
        return model

    def backward(self, loss, *, is_last):
        loss.backward()
        if is_last:
            grads = self.exchange([p.grad.clone() for p in self.model.parameters()])
            for i, p in enumerate(self.model.parameters()):
                p.grad = sum(rank[i] for rank in grads)

    def sum_counts(self, *counts):
        return tuple(map(sum, zip(*self.exchange(counts), strict=True)))

    def sum_values(self, values):
        found = self.exchange(values)
        return {name: sum(rank[name] for rank in found) for name in values}

    def from_main(self, value):
        return self.exchange(value)[0]

    def first_of(self, value):
        return next((found for found in self.exchange(value) if found is not None), None)

    def on_main(self, work):
        result = error = None
        if self.is_main:
            try:
                result = work()
            except UserError as caught:
                error = caught
        if error := self.exchange(error)[0]:
            raise UserError(str(error), error.code)
        return result

    def save(self, store, **parts):
        self.on_main(lambda: store.save(**parts) and None)


class SharedTask(TinyTask):
    """A rank's rows of every batch; all of them for one rank of one."""

    def __init__(self, config, rank=0, ranks=1, **settings):
        super().__init__(config, ragged=True, **settings)
        self.rank, self.ranks = rank, ranks

    def next_batch(self):
        ids, targets, position = super().next_batch()
        return ids[self.rank :: self.ranks], targets[self.rank :: self.ranks], position

    def loss(self, model, batch):
        correct = (model(batch[0]).argmax(-1) == batch[1]).sum()
        return StepLoss(super().loss(model, batch), {"accuracy": correct})

    def evaluate(self, model):
        position, self.position = self.position, 10**6
        batch = TinyTask.next_batch(self)
        self.position = position
        return {"val_loss": TinyTask.loss(self, model, batch).item() / self.num_targets(batch)}


def train(run_dir, parallel, rank=0, ranks=1, resume=False, check_lock=lambda: None, **changes):
    config = TrainConfig.from_dict(SETTINGS | changes)
    torch.manual_seed(0)
    model = parallel.prepare(TinyModel(dropout=0.0).double(), None, config)
    resume_from = run_folder.checkpoints_of(run_dir)[0] if resume else None
    task = SharedTask(config, rank, ranks)
    trainer = Trainer(
        model,
        task,
        ROLES,
        config,
        run_dir,
        {},
        resume_from,
        display=PlainDisplay(),
        check_lock=check_lock,
        parallel=parallel,
    )
    return trainer.run()


def train_on_ranks(run_dir, **changes):
    """Train on all ranks; returns what each returned or raised."""
    shared, found = Shared(), [None] * RANKS

    def work(rank):
        try:
            found[rank] = train(run_dir, Thread(rank, shared), rank, RANKS, **changes)
        except Exception as error:
            found[rank] = error
            if not isinstance(error, UserError):
                # the others wait for a rank that is gone
                shared.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def curve(run_dir):
    keys = ("step", "tokens", "loss", "grad_norm", "val_loss", "figures")
    return [[r.get(k) for k in keys] for r in read_metrics(run_dir) if r["kind"] in ("train", "validation")]


def assert_same_curve(found, wanted):
    assert len(found) == len(wanted) > 6
    for one, other in zip(found, wanted, strict=True):
        assert one[:2] == other[:2]
        for value, other_value in zip(one[2:], other[2:], strict=True):
            assert value == (pytest.approx(other_value, rel=1e-6) if other_value else other_value)


@pytest.fixture
def _same_weights(monkeypatch):
    """Threads share the generator: draw the weights once."""
    torch.manual_seed(0)
    state = TinyModel(dropout=0.0).state_dict()
    original = TinyModel.__init__

    def init(self, **settings):
        original(self, **settings)
        self.load_state_dict(state)

    monkeypatch.setattr(TinyModel, "__init__", init)


@pytest.mark.usefixtures("_same_weights")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_give_the_losses_of_one_process(tmp_path, accumulation):
    for name in ("one", "two"):
        checkpoint.create_run(tmp_path / name, {})
    train(tmp_path / "one", ONE_PROCESS, grad_accumulation=accumulation)
    results = train_on_ranks(tmp_path / "two", grad_accumulation=accumulation)
    assert [result.counters.step for result in results] == [6, 6]
    assert_same_curve(curve(tmp_path / "two"), curve(tmp_path / "one"))
    # one of them wrote: a checkpoint of every validation, each record once
    names = [[path.name for path in run_folder.checkpoints_of(tmp_path / name)] for name in ("one", "two")]
    assert names[0] == names[1]
    # one process goes on from a checkpoint of two, and the other way
    train(tmp_path / "two", ONE_PROCESS, grad_accumulation=accumulation, resume=True)
    assert_same_curve(curve(tmp_path / "two"), curve(tmp_path / "one"))
    train_on_ranks(tmp_path / "two", grad_accumulation=accumulation, resume=True)
    assert_same_curve(curve(tmp_path / "two"), curve(tmp_path / "one"))


@pytest.mark.usefixtures("_same_weights")
def test_all_ranks_stop_after_the_same_step(tmp_path):
    checkpoint.create_run(tmp_path / "run", {})
    settings = {"max_steps": None, "max_time_s": 0.3, "validation_every": 0}
    results = train_on_ranks(tmp_path / "run", **settings)
    steps = {result.counters.step for result in results}
    assert len(steps) == 1
    assert steps != {0}


@pytest.mark.usefixtures("_same_weights")
def test_an_error_of_the_main_rank_stops_all(tmp_path):
    checkpoint.create_run(tmp_path / "run", {})

    def replaced():
        raise UserError("the folder was replaced", "in-use")

    found = train_on_ranks(tmp_path / "run", check_lock=replaced)
    assert [error.code for error in found] == ["in-use", "in-use"]
    assert run_folder.checkpoints_of(tmp_path / "run") == []


def test_one_process_shares_nothing(tmp_path):
    one: Parallel = OneProcess()
    model = TinyModel()
    assert one.prepare(model, TinyTask(TrainConfig(max_steps=1)), TrainConfig(max_steps=1)) is model
    assert one.sum_counts(3, 4) == (3, 4)
    values = {"loss": torch.ones(())}
    assert one.sum_values(values)["loss"] is values["loss"]
    norm = torch.ones(())
    assert one.global_norm(norm) is norm
    assert one.from_main("x") == one.first_of("x") == "x"
    assert one.first_of(None) is None
    with run_lock(tmp_path / "run"), pytest.raises(UserError):
        one.on_main(lambda: run_lock(tmp_path / "run").__enter__())
