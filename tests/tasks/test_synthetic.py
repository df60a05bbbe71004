"""Tasks of generators: they train by command, resume with equal losses, and validate at other lengths."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hgrn2 import HGRN2LM, HGRN2Config
from hgrn2.formats import run_folder
from hgrn2.tasks import GENERATORS, TASKS, TaskContext, find_task, generate
from hgrn2.tasks.generators import MQAROptions, ParityOptions
from hgrn2.tasks.synthetic import SyntheticBatch
from hgrn2.train.metrics import read_metrics
from tests.refusals import refuses
from tests.tasks.commands import command, curve, refused

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "expand_ratio": 8, "intermediate_size": 16}
MODEL = ["--device", "cpu", "--set", *(f"{key}={value}" for key, value in SIZES.items())]


@pytest.fixture(autouse=True)
def _folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def model_for(options):
    torch.manual_seed(0)
    return HGRN2LM(HGRN2Config(**SIZES, vocab_size=options.vocab_size))


# default options; one checkpoint only, see below for all
@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATORS)
def test_it_trains_by_command_and_resumes(name):
    words = ["train", "--task", name, "--task-set", "validation_examples=8", "--batch-size", 2, "--max-steps", 3]
    command(*words, "--validation-every", 1, "--checkpoint-every", 1, *MODEL, "--out", "run")
    config = json.loads(Path("run/config.json").read_text())
    assert config["task"]["name"] == name
    assert config["model"]["vocab_size"] == GENERATORS[name]().vocab_size
    page = Path("run/report.html").read_text()
    last = [r for r in read_metrics(Path("run")) if r["kind"] == "validation"][-1]
    assert f"{last['val_accuracy']:.1%}" in page
    wanted = curve("run")
    shutil.copytree("run", "again")
    first = run_folder.checkpoints_of(Path("again"))[0]
    command("train", "--resume", first)
    assert curve("again") == wanted


@pytest.mark.slow
def test_mqar_by_command_with_other_lengths(capsys):
    words = ["num_pairs=2", "length=16", "vocab_size=20", "validation_examples=10", "training_examples=6"]
    words += ["eval_lengths=[32]", 'eval_at=[{"num_pairs": 4}]']
    settings = ["--batch-size", 4, "--max-steps", 3, "--validation-every", 1, "--checkpoint-every", 1]
    command("train", "--task", "mqar", "--task-set", *words, *settings, *MODEL, "--out", "run")
    shown = capsys.readouterr()
    assert "val_accuracy" in shown.out
    last = [r for r in read_metrics(Path("run")) if r["kind"] == "validation"][-1]
    for ending in ("", "_length_32", "_num_pairs_4"):
        assert 0 <= last[f"val_accuracy{ending}"] <= 1
        assert last[f"val_loss{ending}"] > 0
        assert 0 <= last[f"val_exact{ending}"] <= 1
    assert f"accuracy {last['val_accuracy']:.1%}" in shown.err
    page = Path("run/report.html").read_text()
    for label, key in (("accuracy, length 32", "length_32"), ("accuracy, num pairs 4", "num_pairs_4")):
        assert f"<dt>{label}</dt><dd><b>{last[f'val_accuracy_{key}']:.1%}</b>" in page
    wanted = curve("run")
    for path in run_folder.checkpoints_of(Path("run")):
        shutil.copytree("run", "again", dirs_exist_ok=True)
        command("train", "--resume", Path("again/checkpoints") / path.name)
        assert curve("again") == wanted
        shutil.rmtree("again")


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--task", "mqra"], ["mqra", "'mqar'"]),
        (["--task", "mqar", "--task-set", "num_pair=3"], ["num_pair", "num_pairs"]),
        (["--task", "mqar", "--task-set", "num_pairs=20"], ["num_pairs 20", "80", "64"]),
        (["--task", "mqar", "--task-set", "vocab_size=6"], ["num_pairs is 4", "vocab_size of 6", "2 keys"]),
        (["--task", "mqar", "--set", "vocab_size=100"], ["8192", "100"]),
        (["--task", "mqar", "--stream"], ["'stream'", "'language'"]),
    ],
)
def test_mistakes_are_named(words, names, capsys):
    error = refused(capsys, "train", *words, "--max-steps", 3)
    assert error.count("\n") == 1
    assert not [name for name in names if name not in error], error
    assert not Path("runs").exists()


def test_the_loss_is_that_of_the_model():
    options = MQAROptions(length=16, num_pairs=3, vocab_size=20)
    task = find_task("mqar").build(options, TaskContext(batch_size=5, seed=7))
    model = model_for(options)
    batch = task.next_batch()
    found = task.loss(model, batch)
    inputs, targets = (torch.from_numpy(x) for x in generate(options, 5, seed=7))
    wanted = model.loss(inputs, targets)
    assert task.num_targets(batch) == wanted.num_targets == 15
    assert task.num_tokens(batch) == 80
    torch.testing.assert_close(found.loss_sum, wanted.sum)
    logits, _ = model(inputs)
    assert found.sums["accuracy"] == (logits.argmax(-1) == targets).sum()


def test_figures_count_targets_and_whole_examples():
    options = ParityOptions(length=6, validation_examples=7)
    task = find_task("parity").build(options, TaskContext(batch_size=3))
    model = model_for(options)
    figures = task.evaluate(model)
    inputs, targets = (torch.from_numpy(x) for x in generate(options, 7, stream=1))
    is_correct = model(inputs)[0].argmax(-1) == targets
    assert figures["val_accuracy"] == pytest.approx(is_correct.float().mean().item())
    assert figures["val_exact"] == pytest.approx(is_correct.all(1).float().mean().item())
    assert figures["val_loss"] == pytest.approx(model.loss(inputs, targets).mean.item())


def test_figures_at_other_lengths_are_those_of_a_task_of_that_length():
    context = TaskContext(batch_size=400)
    model = model_for(ParityOptions())
    # a fixed training set does not change what is held out
    settings = {"validation_examples": 1100, "training_examples": 5}
    figures = find_task("parity").build(ParityOptions(length=6, eval_lengths=[9], **settings), context).evaluate(model)
    wanted = find_task("parity").build(ParityOptions(length=9, validation_examples=1100), context).evaluate(model)
    for name, value in wanted.items():
        assert figures[f"{name}_length_9"] == pytest.approx(value)


def test_examples_that_cannot_be_drawn_are_refused_before_training(capsys):
    lengths = "min_length=5", "length=7", "max_args=2"
    for words in (lengths, ["max_args=2", 'eval_at=[{"min_length": 5, "length": 7}]']):
        error = refused(capsys, "train", "--task", "listops", "--max-steps", 3, "--task-set", *words)
        assert "5 (min_length)" in error
        assert not Path("runs").exists()


def test_batches_follow_from_seed_and_position():
    options = ParityOptions(length=300)
    task = find_task("parity").build(options, TaskContext(batch_size=500, seed=2))
    batches = [task.next_batch() for _ in range(4)]
    # batches span blocks of examples
    assert torch.cat([b.input_ids for b in batches]).equal(torch.from_numpy(generate(options, 2000, seed=2).inputs))
    state = task.state_dict()
    wanted = task.next_batch()
    again = find_task("parity").build(options, TaskContext(batch_size=500, seed=2))
    again.load_state(state, {})
    assert again.next_batch().input_ids.equal(wanted.input_ids)
    with refuses("damaged", "examples is -1"):
        again.load_state({"examples": -1}, {})


def test_a_fixed_training_set_is_shuffled_in_every_epoch():
    options = ParityOptions(length=12, training_examples=50)
    task = find_task("parity").build(options, TaskContext(batch_size=20, seed=2))
    seen = torch.cat([task.next_batch().input_ids for _ in range(5)]).numpy()
    whole = generate(options, 50, seed=2).inputs
    for epoch in (seen[:50], seen[50:]):
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, whole))
    assert not np.array_equal(seen[:50], seen[50:])
    assert not np.array_equal(seen[:50], whole)


def test_a_batch_on_a_device_is_the_same():
    batch = SyntheticBatch.of(generate(ParityOptions(length=4), 3))
    moved = batch.to(torch.device("meta"))
    assert {x.device.type for x in vars(moved).values()} == {"meta"}
    assert [x.shape for x in vars(moved).values()] == [x.shape for x in vars(batch).values()]


def test_samples_on_the_command_line(capsys):
    command("task")
    listed = capsys.readouterr().out
    assert not [name for name in GENERATORS if name not in listed]
    command("task", "mqar", "--samples", 2, "--seed", 4, "--task-set", "length=16", "vocab_size=30")
    out = capsys.readouterr().out
    assert "num_pairs" in out
    inputs = generate(MQAROptions(length=16, vocab_size=30), 2, seed=4).inputs
    for row in inputs:
        assert f" k{row[2]} v{row[3] - 15} " in out
    assert "did you mean 'mqar'" in refused(capsys, "task", "mqra")
    assert "'language'" in refused(capsys, "task", "language")
    assert "--samples is -1" in refused(capsys, "task", "mqar", "--samples", -1)
    assert "num_pairs 20" in refused(capsys, "task", "mqar", "--task-set", "num_pairs=20")
    assert "--task-set" in refused(capsys, "task", "--task-set", "num_pairs=20")
    # its former name
    assert "num_pairs 20" in refused(capsys, "task", "mqar", "--set", "num_pairs=20")


def test_lists_on_the_command_line_need_no_brackets(capsys):
    for words in (["eval_lengths=128,256"], ["eval_lengths=[128,256]"]):
        command("task", "mqar", "--samples", 0, "--task-set", *words)
        assert "[128, 256]" in capsys.readouterr().out
    command("task", "mqar", "--samples", 0, "--task-set", "eval_lengths=128", 'eval_at={"num_pairs": 2}')
    out = capsys.readouterr().out
    assert "[128]" in out
    assert "[{'num_pairs': 2}]" in out
    assert "eval_lengths is '128;256'" in refused(capsys, "task", "mqar", "--task-set", "eval_lengths=128;256")
    assert "num_pairs is [8, 16]" in refused(capsys, "task", "mqar", "--task-set", "num_pairs=8,16")


def test_options_given_as_flags_or_as_settings_of_the_model_are_led_to_task_set(capsys):
    assert "--task-set length=8" in refused(capsys, "task", "parity", "--length=8")
    assert "--task-set num_pairs=VALUE" in refused(capsys, "train", "--task", "mqar", "--num-pairs", 4)
    assert "--task-set num_pairs=4" in refused(capsys, "train", "--task", "mqar", "--set", "num_pairs=4")


def test_a_new_generator_is_one_short_file(capsys):
    before = dict(GENERATORS), dict(TASKS)
    try:
        from tests.tasks import count_generator

        assert len(Path(count_generator.__file__).read_text().splitlines()) < 40
        words = ["--batch-size", 2, "--max-steps", 1, "--task-set", "eval_lengths=[4]", "validation_examples=3"]
        command("train", "--task", "count", *words, *MODEL, "--out", "run")
        assert "val_accuracy_length_4" in read_metrics(Path("run"))[-1] | read_metrics(Path("run"))[-2]
        capsys.readouterr()
        command("task", "count", "--samples", 1)
        inputs, targets = generate(count_generator.CountOptions(), 1)
        above, below = capsys.readouterr().out.splitlines()[-2:]
        assert above.split() == ["abc"[x] for x in inputs[0]]
        assert below.split() == ["abc"[x] for x in targets[0]]
        assert targets[0].tolist() == [inputs[0, :t].tolist().count(x) % 3 for t, x in enumerate(inputs[0])]
    finally:
        for registry, entries in zip((GENERATORS, TASKS), before, strict=True):
            registry.clear()
            registry.update(entries)


def test_a_resumed_run_keeps_its_examples(capsys):
    options = ["length=16", "num_pairs=2", "vocab_size=16"]
    first = ["train", "--task", "mqar", "--task-set", *options, "--set", "hidden_size=16", "num_hidden_layers=1"]
    command(*first, "expand_ratio=16", "--batch-size", "2", "--max-steps", "2", "--out", "run")
    capsys.readouterr()
    error = refused(capsys, "train", "--resume", "run", "--task-set", "vocab_size=8", "--max-steps", "3")
    assert "vocab_size is 8, was 16" in error
    # what only validations depend on may change
    command("train", "--resume", "run", "--task-set", "eval_lengths=[32]", "--max-steps", "3")
    assert "eval_at" not in capsys.readouterr().err


def test_the_report_of_a_task_names_commands_that_work(capsys):
    command("train", "--task", "parity", "--batch-size", 2, "--max-steps", 2, *MODEL, "--out", "run")
    page = Path("run/report.html").read_text()
    assert "hgrn2 generate" not in page
    assert "hgrn2 eval" not in page
    assert "hgrn2 info run" in page
    command("info", "run")
