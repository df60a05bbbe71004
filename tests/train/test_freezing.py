"""Weights that stay as they are at first: which, for how long, and that resuming does not show."""

import dataclasses
import shutil

import pytest
import torch
from torch import nn

from hgrn2.formats import run_folder
from hgrn2.models import HGRN2LM, HGRN2Config
from hgrn2.storage.lock import run_lock
from hgrn2.train import checkpoint
from hgrn2.train.config import TrainConfig
from hgrn2.train.display import PlainDisplay
from hgrn2.train.freezing import Freezing, frozen_names
from hgrn2.train.loop import Trainer
from hgrn2.train.metrics import read_metrics
from hgrn2.train.optim import NamedOptimizer
from tests.refusals import refuses
from tests.train.tiny_run import ROLES, TinyModel, TinyTask, losses

SIZE = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "expand_ratio": 4, "intermediate_size": 12}
FROZEN = ("embedding.weight", "head.weight")
SETTINGS = {
    "max_steps": 24, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, "validation_every": 8,
    "checkpoint_every": 3, "keep_last": 20, "device": "cpu", "freeze": "embedding.*,head.*", "unfreeze_every": 4,
    "unfreeze_threshold": 0.1,
}  # fmt: skip


def make_freezing(**settings):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    config = TrainConfig(max_steps=1, freeze="a.*", **settings)
    return model, Freezing(model, ["a.weight"], config)


def feed(freezing, values):
    """The index of the loss with which the weights are let go, or None."""
    return next((i for i, loss in enumerate(values) if freezing.count(loss)), None)


# intervals of two steps, with means 4, 3, 2.6, 2.5
LOSSES = [5.0, 3.0, 3.5, 2.5, 2.7, 2.5, 2.5, 2.5]


@pytest.mark.parametrize(
    ("threshold", "wanted"),
    # the first interval has none before it; an improvement of just the threshold is enough
    [(2.0, 3), (1.0, 5), (0.5, 5), (0.375, 7), (0.05, None)],
)
def test_when_the_loss_improves_too_little(threshold, wanted):
    model, freezing = make_freezing(unfreeze_every=2, unfreeze_threshold=threshold)
    assert (model["a"].weight.requires_grad, model["b"].weight.requires_grad) == (False, True)
    assert feed(freezing, LOSSES) == wanted
    assert freezing.frozen == (wanted is None)
    assert model["a"].weight.requires_grad == (wanted is not None)
    # once is enough
    assert feed(freezing, LOSSES) is None or wanted is None


def test_a_loss_that_rises_lets_go():
    _, freezing = make_freezing(unfreeze_every=1, unfreeze_threshold=0.01)
    assert feed(freezing, [1.0, 0.9, 0.95]) == 2


def test_never():
    with pytest.warns(UserWarning, match="unfreeze_threshold has no effect with weights that are never"):
        _, freezing = make_freezing(unfreeze_every=0, unfreeze_threshold=1.0)
    assert feed(freezing, [1.0] * 300) is None


def test_defaults():
    _, freezing = make_freezing()
    # 100 steps an interval, and 0.02 nats
    assert feed(freezing, [3.0] * 100 + [2.975] * 100 + [2.96] * 100) == 299


@pytest.mark.parametrize("count", range(9))
def test_the_state_in_the_middle_of_an_interval(count):
    settings = {"unfreeze_every": 2, "unfreeze_threshold": 0.45}
    _, whole = make_freezing(**settings)
    wanted = feed(whole, LOSSES)
    _, first = make_freezing(**settings)
    found = feed(first, LOSSES[:count])
    model, second = make_freezing(**settings)
    second.load_state_dict(first.state_dict())
    if found is None:
        rest = feed(second, LOSSES[count:])
        found = None if rest is None else count + rest
    assert found == wanted == 5
    assert not second.frozen
    assert model["a"].weight.requires_grad


def test_the_learning_rate_of_what_was_frozen():
    _, freezing = make_freezing(unfreeze_every=1, unfrozen_lr_fraction=0.5, warmup_steps=0)
    assert feed(freezing, [1.0, 1.0]) == 1
    assert freezing.lr_fraction() == 0.5
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    config = TrainConfig(max_steps=9, freeze="a.*", unfreeze_every=1, unfrozen_lr_fraction=0.2, warmup_steps=4)
    freezing = Freezing(model, ["a.weight"], config)
    feed(freezing, [1.0, 1.0])
    found = []
    for _ in range(5):
        found.append(freezing.lr_fraction())
        freezing.count(1.0)
    assert found == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2])
    # which travels
    again = Freezing(model, ["a.weight"], config)
    again.load_state_dict({**freezing.state_dict(), "num_free_steps": 2})
    assert again.lr_fraction() == pytest.approx(0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_groups_of_the_optimizer(optimizer):
    model = TinyModel(dropout=0.0)
    config = TrainConfig(max_steps=9, optimizer=optimizer, learning_rate=0.1, weight_decay=0.0)
    waiting = ("embedding.weight", "hidden.weight", "norm.bias")
    made = NamedOptimizer(model, ROLES, config, waiting)
    assert made.set_lr_fraction(0.5, 0.2) == pytest.approx(0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    made.step()
    sizes = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    adamw = {name: size for name, size in sizes.items() if optimizer == "adamw" or name != "hidden.weight"}
    # AdamW's first step is of the size of its learning rate
    assert adamw == pytest.approx({name: 0.01 if name in waiting else 0.05 for name in adamw}, rel=1e-3)
    whole = TinyModel(dropout=0.0)
    whole.load_state_dict(before)
    other = NamedOptimizer(whole, ROLES, config)
    other.set_lr_fraction(0.1)
    for p in whole.parameters():
        p.grad = torch.ones_like(p)
    other.step()
    torch.testing.assert_close(whole.hidden.weight, model.hidden.weight)


# which weights


def lm(**changes):
    return HGRN2LM(HGRN2Config(**SIZE | changes))


def test_what_a_start_from_a_transformer_copies():
    attn = {"layers": [1], "num_heads": 2, "num_kv_heads": 1, "qkv_bias": True}
    model = lm(attn=attn, use_short_conv=True)
    learn = {name for name, _ in model.named_parameters()} - set(frozen_names(model, "copied"))
    own = ("q_proj", "f_proj", "i_proj", "g_norm", "q_conv1d", "f_conv1d", "i_conv1d")
    assert learn == {"model.lower_bounds"} | {f"model.layers.0.attn.{name}.weight" for name in own}


def test_patterns_of_names():
    model = lm()
    mlps = [f"model.layers.{i}.mlp.{x}_proj.weight" for i in range(2) for x in ("gate", "up", "down")]
    assert frozen_names(model, "*.mlp.*") == mlps
    assert frozen_names(model, " lm_head.weight, model.embeddings.*") == ["model.embeddings.weight", "lm_head.weight"]
    assert frozen_names(model, "") == []


@pytest.mark.parametrize(
    ("freeze", "code", "name"),
    [
        ("copeid", "unknown-name", "'copeid'"),
        ("*.mlp.*,", "unknown-name", "''"),
        ("*", "invalid-value", "'*'"),
    ],
)
def test_settings_that_freeze_nothing_or_all(freeze, code, name):
    with refuses(code, "freeze", name):
        frozen_names(lm(), freeze)


def test_a_model_of_attention_alone_has_nothing_new():
    model = lm(attn={"layers": [0, 1], "num_heads": 2}, use_lower_bound=False)
    with refuses("invalid-value", "freeze is 'copied'"):
        frozen_names(model, "copied")


# in a run


def run(run_dir, resume=False, **changes):
    config = TrainConfig.from_dict(SETTINGS | changes)
    with run_lock(run_dir):
        if not resume:
            checkpoint.create_run(run_dir, {"train": config.to_dict()})
        torch.manual_seed(config.seed)
        trainer = Trainer(
            model=TinyModel(), task=TinyTask(config, bad_batches=(5,)), roles=ROLES, config=config, run_dir=run_dir,
            run_config={"train": config.to_dict()}, display=PlainDisplay(), frozen=FROZEN if config.freeze else (),
            resume_from=run_folder.resume_point(run_dir)[1] if resume else None,
        )  # fmt: skip
        trainer.run()
    return trainer


def models(run_dir):
    return {int(path.name[5:]): checkpoint.load_checkpoint(path) for path in run_folder.checkpoints_of(run_dir)}


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder)
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_do_not_move_and_then_do(optimizer, tmp_path):
    run(tmp_path / "run", optimizer=optimizer, weight_decay=0.5)
    torch.manual_seed(0)
    first = dict(TinyModel().named_parameters())
    step = next(r["step"] for r in read_metrics(tmp_path / "run") if r["kind"] == "unfreeze")
    # a skipped step is not counted
    assert step % 4 == 1
    found = models(tmp_path / "run")
    assert min(found) < step < max(found)
    for number, saved in found.items():
        moved = {name for name, x in saved.model.items() if not torch.equal(x, first[name])}
        waiting = set() if number > step else set(FROZEN)
        assert moved == saved.model.keys() - waiting
        assert {name.rpartition("/")[0] for name in saved.optimizer} == saved.model.keys() - waiting
    # counted from when they were let go
    last = found[max(found)].optimizer
    if optimizer == "adamw":
        assert (int(last["hidden.weight/step"]), int(last["head.weight/step"])) == (23, 24 - step)


def test_resuming_from_any_checkpoint(frozen_run, tmp_path, capfd):
    wanted, last = losses(frozen_run), models(frozen_run)[24]
    step = next(r["step"] for r in read_metrics(frozen_run) if r["kind"] == "unfreeze")
    for number in (3, step - step % 3, step - step % 3 + 3):
        copy = tmp_path / str(number)
        shutil.copytree(frozen_run, copy)
        for path in run_folder.checkpoints_of(copy):
            if int(path.name[5:]) > number:
                shutil.rmtree(path)
        run(copy, resume=True)
        assert losses(copy) == wanted
        assert [r["step"] for r in read_metrics(copy) if r["kind"] == "unfreeze"] == [step]
        again = models(copy)[24]
        assert all(torch.equal(again.model[name], x) for name, x in last.model.items())
        assert again.optimizer.keys() == last.optimizer.keys()
    assert f"step {step}: the loss has stopped improving" in capfd.readouterr().err


@pytest.mark.parametrize("freeze", ["", "*.bias"])
def test_a_resumed_run_keeps_its_freezing(frozen_run, tmp_path, freeze):
    shutil.copytree(frozen_run, tmp_path / "run")
    changes = {} if freeze else {"unfreeze_every": None, "unfreeze_threshold": None}
    with refuses("mismatch", "freeze", repr(freeze)):
        run(tmp_path / "run", resume=True, freeze=freeze, **changes)
    assert models(tmp_path / "run").keys() == models(frozen_run).keys()


def test_freezing_changes_the_run(frozen_run, tmp_path):
    run(tmp_path / "run", freeze="", unfreeze_every=None, unfreeze_threshold=None)
    assert losses(tmp_path / "run")[0] != losses(frozen_run)[0]
    assert not [r for r in read_metrics(tmp_path / "run") if r["kind"] == "unfreeze"]


def test_a_checkpoint_from_before_there_was_freezing(frozen_run, tmp_path):
    path = run_folder.checkpoints_of(frozen_run)[0]
    old = checkpoint.load_checkpoint(path)
    state = {key: value for key, value in old.state.items() if key != "freezing"}
    folder = tmp_path / "run"
    config = {"train": TrainConfig.from_dict(SETTINGS).to_dict()}
    checkpoint.create_run(folder, config)
    checkpoint.CheckpointStore(folder, 1).save(
        model=old.model, optimizer=old.optimizer, task=old.task, state=state, config=config, best_step=None
    )
    run(folder, resume=True)
    assert read_metrics(folder)[-1]["step"] == 24


def test_settings():
    config = TrainConfig(max_steps=5, freeze="copied", unfreeze_every=7, unfreeze_threshold=0.5)
    assert TrainConfig.from_dict(config.to_dict()) == config
    for name in ("unfreeze_every", "unfreeze_threshold", "unfrozen_lr_fraction"):
        with pytest.warns(UserWarning, match=f"{name} has no effect with weights that are never frozen"):
            TrainConfig(max_steps=5, **{name: 1})
        with refuses("invalid-value", f"{name} is -1"):
            dataclasses.replace(config, **{name: -1})
