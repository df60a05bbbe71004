"""`hgrn2 train --from`: a new run that begins with the weights of a model, a Transformer's start among them."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from hgrn2 import cli
from hgrn2.data import prepare, train_bpe
from hgrn2.formats.opening import open_folder
from hgrn2.inference.writing import Writer
from hgrn2.train import plots
from hgrn2.train.metrics import read_metrics
from tests.formats.llama import LLAMA, TENSORS
from tests.formats.published import FLA_CONFIG, draw, fla_shapes, write
from tests.train.tiny_run import saved_tensors

FLAGS = [
    "--data", "text", "--batch-size", "2", "--seq-len", "24", "--max-steps", "6", "--validation-every", "3",
    "--checkpoint-every", "2", "--keep-last", "9", "--validation-tokens", "200", "--device", "cpu",
    "--num-threads", "1", "--warmup-steps", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Text, a Llama with a tokenizer, and a hybrid started from it."""
    place = tmp_path_factory.mktemp("from")
    (place / "text").mkdir()
    for i in range(30):
        (place / "text" / f"{i}.txt").write_text(f"text {i}: " + " ".join(f"word{i * k % 11}" for k in range(20)))
    llama = write(place / "llama", LLAMA, TENSORS)
    train_bpe([file.read_text() for file in (place / "text").iterdir()], 260).save(llama)
    command = ["convert", "--from-transformer", str(llama), str(place / "start"), "--keep-attention", "3"]
    assert cli.main(command) == 0
    return place


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # samples and pictures take longer than these runs, and are tested elsewhere
    monkeypatch.setattr(Writer, "write", lambda *_: ())
    monkeypatch.setattr(plots, "plot_run", lambda run: [])
    for name in ("text", "llama", "start"):
        os.symlink(made / name, name)
    return tmp_path


def train(*flags, out="run"):
    return cli.main(["train", "--out", out, *FLAGS, *flags])


def refused(capsys, flags, message):
    capsys.readouterr()
    assert train(*flags) == 2
    *news, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith(("prepared ", "reusing ")) for line in news)
    assert error.startswith("error: ")
    assert message in error
    assert not Path("run").exists()


def figures(run):
    keys = ("kind", "step", "loss", "grad_norm", "val_loss")
    return [tuple(r.get(k) for k in keys) for r in read_metrics(Path(run)) if r["kind"] in ("train", "validation")]


def test_the_first_step_is_of_the_model_s_weights(here, capsys):
    assert train("--from", "start", "--learning-rate", "1e-12", "--weight-decay", "0") == 0
    saved = saved_tensors(here / "run")
    start = open_folder(here / "start")
    assert saved.keys() == set(start.names)
    for name in start.names:
        # a step may not be smaller than the last bit, but the weights are these
        torch.testing.assert_close(saved[name], start.read(name), rtol=1e-6, atol=1e-9)
    # settings and tokens came with it
    config = json.loads((here / "run" / "config.json").read_text())
    assert config["model"] == start.config.to_dict() | {"attn": config["model"]["attn"]}
    assert config["model"]["attn"]["layers"] == [3]
    assert (here / "run" / "tokenizer.json").is_file()
    assert config["data"]["tokenizer"].endswith("start")
    # and the run goes on like any other
    assert cli.main(["train", "--resume", "run", "--max-steps", "7"]) == 0
    assert cli.main(["train", "--resume", "run", "--from", "start"]) == 2
    assert "drop --from" in capsys.readouterr().err


def test_nothing_is_copied_without_a_start(here, capsys):
    refused(capsys, ["--data", "text", "--freeze", "copied"], "--freeze copied: nothing is copied without --from")
    assert not Path("run").exists()


def test_a_run_goes_on_in_a_new_one(here):
    assert train("--from", "start") == 0
    assert train("--from", "run", "--set", "dropout=0.2", out="second") == 0
    config = json.loads((here / "second" / "config.json").read_text())
    assert config["model"]["dropout"] == 0.2
    # from its last checkpoint, which the first one has learnt since the start
    losses = [[x[2] for x in figures(name) if x[0] == "train"] for name in ("run", "second")]
    assert losses[1][0] < losses[0][0]


STAGED = ["--freeze", "copied", "--unfreeze-every", "2", "--unfreeze-threshold", "9", "--teacher", "llama"]


def test_staged_and_taught_and_resumed(here):
    assert train("--from", "start", *STAGED) == 0
    wanted = figures("run")
    start = open_folder(here / "start")
    own = {"model.lower_bounds"}
    own |= {f"model.layers.{i}.attn.{x}.weight" for i in range(3) for x in ("q_proj", "f_proj", "i_proj", "g_norm")}
    for step, moved in ((2, own), (4, own), (6, set(start.names))):
        saved = saved_tensors(here / "run" / "checkpoints" / f"step-{step:08d}")
        assert {name for name, x in saved.items() if not torch.equal(x, start.read(name))} == moved
    # the teacher is found from elsewhere, too
    Path("elsewhere").mkdir()
    for step in (2, 4):
        shutil.copytree("run", f"again-{step}")
        os.chdir("elsewhere")
        checkpoints = here / f"again-{step}" / "checkpoints"
        assert cli.main(["train", "--resume", str(checkpoints / f"step-{step:08d}")]) == 0
        os.chdir(here)
        assert figures(f"again-{step}") == wanted


def test_a_teacher_that_has_moved(here, capsys):
    assert train("--from", "start", *STAGED) == 0
    wanted = figures("run")
    shutil.copytree("run", "again")
    Path("llama").rename("moved")
    resume = ["train", "--resume", "again/checkpoints/step-00000002"]
    capsys.readouterr()
    assert cli.main(resume) == 2
    said = capsys.readouterr().err
    assert f"teacher {here / 'llama'}: no model there" in said
    assert "if the teacher has moved, name its new path: --teacher NEW" in said
    assert cli.main([*resume, "--teacher", "moved"]) == 0
    assert figures("again") == wanted


def test_a_teacher_pulls(here):
    """Training on the teacher's predictions alone brings the model's nearer to them."""
    flags = ["--from", "start", "--teacher", "llama", "--distill-weight", "1", "--learning-rate", "1e-2"]
    assert train(*flags, "--max-steps", "12", "--checkpoint-every", "0") == 0
    losses = [r["loss"] for r in read_metrics(here / "run") if r["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


def test_the_teacher_s_own_weights_have_nothing_to_learn(here):
    flags = ["--from", "llama", "--teacher", "llama", "--distill-weight", "1", "--weight-decay", "0"]
    assert train(*flags) == 0
    # AdamW makes any gradient a step of its own size, so look at the first
    first = next(r for r in read_metrics(here / "run") if r["kind"] == "train")
    assert abs(first["loss"]) < 1e-6
    assert first["grad_norm"] < 1e-5


def test_commands_of_the_guide(here, capsys):
    guide = Path(__file__).resolve().parents[2] / "docs" / "guide" / "start.md"
    section = guide.read_text(encoding="utf-8").split("\n## ")[0]
    commands = [shlex.split(line) for line in re.findall(r"^hgrn2 (.+)$", section, re.MULTILINE)]
    assert [command[0] for command in commands] == ["convert"] * 2 + ["train"] * 2 + ["eval"] * 2
    os.symlink("llama", "SmolLM2-135M")
    os.symlink("text", "notes")
    Path("book.txt").write_text("text 3: word1 word2")
    for command in commands:
        # of the flags that only make it short, none decides about what is shown
        assert cli.main(command + (FLAGS[2:] if command[0] == "train" else [])) == 0, command
    assert "bits/byte" in capsys.readouterr().out
    kept = [open_folder(Path(name)).config.attn for name in ("linear", "hybrid")]
    assert kept[0] is None
    assert kept[1] is not None
    assert kept[1].layers == (3,)
    for name in ("hybrid", "taught"):
        settings = json.loads((here / "runs" / name / "config.json").read_text())["train"]
        assert (settings["freeze"], settings["teacher"] is None) == ("copied", name == "hybrid")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from", "nothing"], "nothing: no model there"),
        (["--from", "start", "--model", "tiny"], "--from brings its own model"),
        (["--from", "start", "--set", "use_short_conv=true"], "do not fit the model in model.layers.0.attn.q_conv1d"),
        (["--from", "start", "--set", "hidden_size=32"], "start: its weights do not fit the model in model."),
        (["--from", "start", "--tokenizer", "bytes"], "knows other tokens than those of the data ('bytes')"),
        (["--from", "start", "--freeze", "*.mpl.*"], "no parameter matches '*.mpl.*'"),
        (["--from", "llama", "--freeze", "copied"], "leaves no weight to train"),
        (["--from", "start", "--teacher", "nowhere"], "teacher nowhere: no model there"),
        (["--from", "start", "--teacher", "llama", "--stream"], "a teacher reads packed documents"),
        (["--model", "tiny", "--teacher", "llama"], "has a vocabulary of 260, the model one of 291"),
        (["--set", "vocab_size=260", "--tokenizer", "bytes", "--teacher", "llama"], "llama: knows other tokens"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(flags, message, here, capsys):
    refused(capsys, flags, message)


def test_data_of_other_tokens(here, capsys):
    prepare(["text"], "bytes", "bytes", progress=False)
    refused(capsys, ["--from", "start", "--data", "bytes"], "knows other tokens than those of the data ('bytes')")


def test_a_model_without_a_tokenizer(here, capsys):
    write(here / "bare", FLA_CONFIG, draw(fla_shapes()))
    assert train("--from", "bare", "--tokenizer", "start", "--max-steps", "1") == 0
    assert read_metrics(here / "run")[-1]["step"] == 1
