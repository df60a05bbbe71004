"""A new task is one file: it trains by command, resumes, keeps the best checkpoint by its metric and is reported."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import hgrn2
from hgrn2 import HGRN2LM
from hgrn2.formats import run_folder
from hgrn2.hf import HGRN2ForCausalLM
from hgrn2.nn.parameters import parameter_roles
from hgrn2.tasks import TASKS, Metric, StepLoss, TaskBase, TaskOptions, find_task, register_task
from hgrn2.train.metrics import read_metrics
from hgrn2.train.run import evaluate_run
from hgrn2.train.runs import saved_task_spec
from tests.plug_ins import install
from tests.refusals import refuses
from tests.tasks import repeat_task
from tests.tasks.commands import command, curve, refused
from tests.tasks.repeat_task import Repeat, RepeatOptions

MODEL = ["hidden_size=16", "num_hidden_layers=1", "expand_ratio=8", "intermediate_size=16"]
TRAIN = ["train", "--task", "repeat", "--device", "cpu", "--set", *MODEL]
SETTINGS = ["--max-steps", "12", "--batch-size", "8", "--learning-rate", "0.03", "--validation-every", "3"]
SETTINGS += ["--checkpoint-every", "4", "--keep-last", "20"]


@pytest.fixture(autouse=True)
def _registered(monkeypatch, tmp_path):
    before = dict(TASKS)
    register_task(Repeat)
    monkeypatch.chdir(tmp_path)
    yield
    TASKS.clear()
    TASKS.update(before)


def test_it_is_one_short_file():
    assert len(Path(repeat_task.__file__).read_text().splitlines()) < 60


def test_it_trains_resumes_and_is_reported(capsys):
    command(*TRAIN, *SETTINGS, "--task-set", "num_symbols=3", "--out", "run")
    out = capsys.readouterr().out
    assert "val_accuracy" in out
    assert "generate" not in out
    config = json.loads(Path("run/config.json").read_text())
    assert config["task"] == {"name": "repeat", "options": {"num_symbols": 3}}
    assert config["model"]["vocab_size"] == 3
    assert "seq_len" not in config["train"]
    assert "data" not in config
    records = read_metrics(Path("run"))
    accuracies = [r["figures"]["accuracy"] for r in records if r["kind"] == "train"]
    assert all(0 <= accuracy <= 1 for accuracy in accuracies)
    assert len(set(accuracies)) > 1
    page = Path("run/report.html").read_text()
    last = [r for r in records if r["kind"] == "validation"][-1]
    assert f"{last['val_accuracy']:.0%}" in page
    assert "num_symbols" in page

    # from every checkpoint on, the same losses
    wanted = curve("run")
    for path in run_folder.checkpoints_of(Path("run")):
        shutil.copytree("run", "again", dirs_exist_ok=True)
        command("train", "--resume", Path("again/checkpoints") / path.name)
        assert curve("again") == wanted
        shutil.rmtree("again")


def test_the_best_checkpoint_is_that_of_the_highest_accuracy():
    command(*TRAIN, *SETTINGS, "--out", "run")
    validations = [r for r in read_metrics(Path("run")) if r["kind"] == "validation"]
    best = max(validations, key=lambda r: r["val_accuracy"])
    folder, _ = run_folder.locate_model(Path("run"), "best")
    assert folder.name == f"step-{best['step']:08d}"
    state = json.loads((folder / "state.json").read_text())
    assert state["best"] == {"step": best["step"], "val_accuracy": best["val_accuracy"]}
    # the lowest accuracy is another step's, or the test shows nothing
    assert min(r["val_accuracy"] for r in validations) < best["val_accuracy"]
    figures = evaluate_run(Path("run"), saved_task_spec(), "best")
    assert figures["val_accuracy"] == best["val_accuracy"]
    assert figures["val_loss"] == pytest.approx(best["val_loss"], rel=1e-6)


def test_its_runs_open_everywhere(capsys):
    command(*TRAIN, "--max-steps", "2", "--batch-size", "2", "--out", "run")
    command("info", "run")
    assert "vocabulary 4" in capsys.readouterr().out
    wanted = HGRN2LM.load("run", device="cpu")
    assert wanted.config.vocab_size == 4
    command("convert", "run", "native", "--to", "native")
    command("convert", "native", "hf", "--to", "hf")
    assert "repeat" in Path("native/config.json").read_text()
    command("convert", "run", "of_run", "--to", "hf")
    assert "repeat" in Path("of_run/README.md").read_text()
    checkpoint = run_folder.checkpoints_of(Path("run"))[-1]
    for i, folder in enumerate((checkpoint, "native", "hf", "of_run")):
        found = HGRN2LM.load(folder, device="cpu")
        assert all(map(torch.equal, found.parameters(), wanted.parameters()))
        # a new run starts with these weights
        command(*TRAIN[:5], "--from", folder, "--max-steps", "1", "--batch-size", "2", "--out", f"started{i}")
    found = HGRN2ForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(found.get_input_embeddings().weight, wanted.model.embeddings.weight)


@pytest.mark.parametrize("place", ["run", "native"])
def test_it_writes_and_reads_no_text(place, capsys):
    command(*TRAIN, "--max-steps", "1", "--batch-size", "2", "--out", "run")
    command("convert", "run", "native", "--to", "native")
    Path("a.txt").write_text("text")
    for words in (["generate", place, "--prompt", "a"], ["eval", place, "a.txt"]):
        error = refused(capsys, *words)
        assert "'repeat'" in error
        assert "tokenizer" in error
    with refuses("unsupported", "repeat", "HGRN2LM.load"):
        hgrn2.load(place, device="cpu")


def test_a_run_whose_model_is_no_language_model(capsys):
    class Small(torch.nn.Linear):
        def parameter_roles(self):
            return parameter_roles(self)

    class Fit(Repeat):
        name = "fit"

        @classmethod
        def build_model(cls, options, config):
            return Small(3, 1)

        def loss(self, model, batch):
            return StepLoss(model(batch[:, :3].float()).square().sum(), {"accuracy": torch.tensor(0)})

    register_task(Fit)
    command(*TRAIN[:1], "--task", "fit", *TRAIN[3:], "--max-steps", "1", "--batch-size", "2", "--out", "run")
    with refuses("unsupported", "'fit'", "--resume"):
        HGRN2LM.load("run", device="cpu")
    assert "'fit'" in refused(capsys, "convert", "run", "out", "--to", "hf")
    # the settings of its config.json are read all the same
    command("info", "run")


def test_settings_from_a_file():
    Path("settings.toml").write_text(
        '[task]\nname = "repeat"\nnum_symbols = 5\n[train]\nmax_steps = 2\nbatch_size = 4\n'
        "[model]\nhidden_size = 16\nnum_hidden_layers = 1\nexpand_ratio = 8\nintermediate_size = 16\n"
    )
    command("train", "--config", "settings.toml", "--out", "run")
    assert json.loads(Path("run/config.json").read_text())["task"]["options"] == {"num_symbols": 5}
    command("train", "--config", "settings.toml", "--task-set", "num_symbols=6", "--out", "other")
    assert json.loads(Path("other/config.json").read_text())["task"]["options"] == {"num_symbols": 6}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--task", "repaet"], ["repaet", "repeat"]),
        (["--task", "repeat", "--task-set", "num_symbol=3"], ["num_symbol", "num_symbols"]),
        (["--task", "repeat", "--task-set", "num_symbols=1"], ["num_symbols is 1", "2 or more"]),
        (["--task", "repeat", "--task-set", "num_symbols=x"], ["num_symbols is 'x'"]),
        (["--task", "repeat", "--task-set", "num_symbols"], ["--task-set num_symbols", "KEY=VALUE"]),
        # options of other tasks, and what goes with text
        (["--task", "repeat", "--stream"], ["'stream'", "'language'", "num_symbols"]),
        (["--task", "repeat", "--task-set", "teacher=x"], ["'teacher'", "'distillation'"]),
        (["--task-set", "num_symbols=3"], ["'num_symbols'", "'repeat'", "seq_len"]),
        (["--task", "repeat", "--data", "x", "--compressors"], ["'repeat'", "--data and --compressors"]),
        (["--task", "repeat", "--task-set", "max_steps=3"], ["'max_steps'", "setting of training"]),
        (["--task", "distillation"], ["teacher is None", "--teacher"]),
        (["--task-set", "seqlen=8"], ["task 'language'", "'seqlen'", "'seq_len'"]),
        (["--task", "repeat", "--task-set"], ["--task-set", "missing"]),
        (["--task-set", "--max-steps", "3"], ["--task-set", "missing"]),
        (["--set", "--", "x"], ["--set", "missing"]),
    ],
)
def test_mistakes_are_named(words, names, capsys):
    error = refused(capsys, "train", *words)
    assert error.count("\n") == 1
    assert not [name for name in names if name not in error], error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "words", "names"),
    [
        ("[task]\nfoo = 1", [], ["task 'language'", "'foo'"]),
        ("[task]\nname = 3", [], ["task.name is 3"]),
        ("[task]\nname = 3", ["--task", "repeat"], ["task.name is 3"]),
        ("[model.mixers]\naverage = 3", [], ["mixers", "layers"]),
        ("[model]\nhiden_size = 3", ["--task", "repeat"], ["hiden_size"]),
        ("", ["--set", "hiden_size=3"], ["hiden_size"]),
        ("", ["--teacher", "nowhere"], ["teacher nowhere"]),
    ],
)
def test_settings_are_checked_before_the_folder(text, words, names, capsys):
    command(*TRAIN, "--max-steps", "1", "--batch-size", "2", "--out", "taken")
    Path("t.toml").write_text(text)
    error = refused(capsys, "train", "--config", "t.toml", *words, "--out", "taken").splitlines()[-1]
    assert not [name for name in names if name not in error], error
    assert "taken" not in error


def test_a_saved_task_that_is_not_registered(capsys):
    command(*TRAIN, "--max-steps", "1", "--batch-size", "2", "--out", "run")
    del TASKS["repeat"]
    assert "'repeat'" in refused(capsys, "train", "--resume", "run")
    # its report is drawn without it
    command("plot", "run")
    register_task(Repeat)
    assert "--data" in refused(capsys, "train", "--resume", "run", "--data", "x")


def test_a_name_is_taken_once():
    with refuses("already-exists", "repeat", "Repeat", "name"):
        register_task(Repeat)
    assert find_task("repeat") is Repeat


def test_an_installed_package_brings_its_task(tmp_path, monkeypatch):
    source = (
        "from hgrn2.tasks import register_task\n"
        "from tests.tasks.repeat_task import Repeat\n"
        "register_task(type('Brought', (Repeat,), {'name': 'brought'}))\n"
    )
    install(tmp_path, monkeypatch, "tasks", "brought = task_of_another", source)
    assert "brought" not in TASKS
    with refuses("unknown-name", "'brough'", "'brought'"):
        find_task("brough")
    command(*TRAIN, "--task", "brought", "--max-steps", "1", "--batch-size", "2", "--out", "run")
    # its report as well
    del TASKS["brought"]
    monkeypatch.delitem(sys.modules, "task_of_another")
    command("plot", "run")
    assert "accuracy" in Path("run/report.html").read_text()


PARTS = ("Options", "metric", "build", "next_batch", "num_tokens", "num_targets", "loss", "evaluate", "state_dict")


@pytest.mark.parametrize("part", [*PARTS, "load_state", "name"])
def test_a_task_without_a_part_of_the_protocol(part):
    parts = {name: value for name, value in vars(Repeat).items() if not name.startswith("__")}
    del parts[part]
    with refuses("incomplete", part):
        register_task(type("Lacking", (TaskBase,), parts | ({} if part == "name" else {"name": "lacking"})))
    assert "lacking" not in TASKS


class Undecorated(RepeatOptions):
    further: int = 3


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("metric", "val_loss"), ("Options", dict), ("Options", type("Bare", (), {})), ("Options", Undecorated),
        ("Options", 3), ("loss", 3), ("load_state", None), ("report", 3), ("reads_text", "no"),
    ],
)  # fmt: skip
def test_a_part_of_another_kind(part, value):
    before = dict(TASKS)
    with refuses("incomplete", "'odd'", part, repr(value)):
        register_task(type("Odd", (Repeat,), {"name": "odd", part: value}))
    assert before == TASKS


def test_a_validation_without_the_metric(capsys):
    class Unmeasured(Repeat):
        name, metric = "unmeasured", Metric("val_recall", higher_is_better=True)

    register_task(Unmeasured)
    error = refused(capsys, *TRAIN, "--task", "unmeasured", "--max-steps", "1", "--batch-size", "2")
    assert "'unmeasured'" in error
    assert "'val_recall'" in error


def faulty(**parts):
    """Register a task with a mistake, and return the words that train it."""
    register_task(type("Faulty", (Repeat,), {"name": "faulty", **parts}))
    return ["train", "--task", "faulty", *TRAIN[3:], "--max-steps", "3", "--batch-size", "2", "--out", "run"]


def without_gradient(task, model, batch):
    return Repeat.loss(task, model, batch).loss_sum.detach()


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"evaluate": lambda task, model: None}, ["evaluate", "None"]),
        ({"evaluate": lambda task, model: {"val_loss": 1.0, "val_accuracy": None}}, ["val_accuracy", "None"]),
        ({"evaluate": lambda task, model: {"val_loss": torch.ones(()), "val_accuracy": 1}}, ["val_loss", "item()"]),
        (
            {"evaluate": lambda task, model: {"val_loss": 1.0, "val_accuracy": 1, "of_each": torch.ones(2)}},
            ["of_each", "tensor"],
        ),
        ({"evaluate": lambda task, model: {"val_loss": 1.0, "val_accuracy": 1, "step": 3}}, ["'step'"]),
        ({"loss": without_gradient}, ["loss", "gradient"]),
        ({"loss": lambda task, model, batch: 1.5}, ["loss", "1.5"]),
        ({"loss": lambda task, model, batch: model(batch)[0]}, ["loss", "scalar"]),
        (
            {"loss": lambda task, model, batch: tuple.__new__(StepLoss, (model(batch)[0].sum(), {"right": 3}))},
            ["right", "3"],
        ),
        ({"loss": lambda task, model, batch: tuple.__new__(StepLoss, (model(batch)[0].sum(), None))}, ["None"]),
        ({"num_targets": lambda task, batch: None}, ["num_targets", "None"]),
        ({"num_tokens": lambda task, batch: torch.tensor(3)}, ["num_tokens", "tensor(3)"]),
        (
            {"build_model": classmethod(lambda cls, options, config: torch.nn.Linear(3, 1))},
            ["parameter_roles", "Linear"],
        ),
    ],
)
def test_mistakes_of_a_task_are_one_line(parts, names, capsys):
    error = refused(capsys, *faulty(**parts)).splitlines()[-1]
    assert error.startswith("error: ")
    assert not [name for name in [*names, "'faulty'"] if name not in error], error


def test_steps_before_a_faulty_validation_are_kept(capsys):
    refused(capsys, *faulty(evaluate=lambda task, model: {"val_loss": 1.0}), "--validation-every", "2")
    assert [path.name for path in run_folder.checkpoints_of(Path("run"))] == ["step-00000002"]
    TASKS["faulty"].evaluate = Repeat.evaluate
    command("train", "--resume", "run")
    assert [r["step"] for r in read_metrics(Path("run")) if r["kind"] == "train"] == [1, 2, 3]


def test_options_are_checked_when_they_are_made():
    assert issubclass(RepeatOptions, TaskOptions)
    with refuses("invalid-value", "num_symbols is 0"):
        RepeatOptions(0)
