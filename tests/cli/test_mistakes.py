"""Mistakes at the keyboard: one line that says what was found and wanted, status 2, and nothing left behind."""

import os
import re

import pytest

from hgrn2 import cli

HUGE = "9" * 400


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    """A folder with some text, an empty file and an empty folder, in which nothing must change."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for i in range(3):
        (tmp_path / "text" / f"{i}.txt").write_text(f"a small text, number {i}\n" * 9)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()

    def start(*args, **settings):
        raise AssertionError("the mistake was not noticed before the training")

    monkeypatch.setattr("hgrn2.train.runs.start_language_run", start)


def error_of(capsys, args):
    capsys.readouterr()
    before = sorted(os.listdir("."))
    assert cli.main(args) == 2, args
    found = capsys.readouterr()
    assert found.out == ""
    *news, error = found.err.splitlines()
    assert all(line.startswith(("prepared ", "no budget given: ")) for line in news), found.err
    assert error.startswith("error: "), found.err
    assert not re.search(r"Traceback|\}\.;|\.;|\?;|STR|INT |'None'|\x1b", error), error
    assert sorted(set(os.listdir(".")) - {"prepared"}) == before
    return error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "message"),
    [
        # commands
        (["trian"], "unknown command 'trian'; did you mean train[?] see hgrn2 --help$"),
        (["Train"], "did you mean train[?]"),
        (["evaluate", "x"], "did you mean eval[?]"),
        (["sample"], "did you mean generate[?]"),
        (["--data", "x"], "--data comes before the command; name that first: train, "),
        (["", "x"], "unknown command ''; see hgrn2 --help$"),
        (["x\x1b[31m"], r"unknown command 'x\\x1b\[31m'"),
        (["\udcff"], "unknown command"),
        (["--print-completion"], "wanted bash, zsh or fish$"),
        (["--print-completion", "csh"], "--print-completion csh: wanted bash, zsh or fish$"),
        # options of other programs
        (["train", "--lr", "0.1"], "unknown option --lr; did you mean --learning-rate[?] see hgrn2 train --help$"),
        (["train", "--batch", "3"], "did you mean --batch-size[?]"),
        (["train", "-bs", "3"], "did you mean --batch-size[?]"),
        (["train", "--epochs=3"], "unknown option --epochs; did you mean --max-steps[?]"),
        (["train", "--steps", "3"], "did you mean --max-steps[?]"),
        (["train", "--wd", "0"], "did you mean --weight-decay[?]"),
        (["train", "--ctx", "3"], "did you mean --seq-len[?]"),
        (["train", "--block-size", "3"], "did you mean --seq-len[?]"),
        (["train", "--max_seq_length", "3"], "did you mean --seq-len[?]"),
        (["train", "-o", "x"], "did you mean --out[?]"),
        (["train", "--bf16"], "did you mean --precision[?]"),
        (["train", "--hidden-size", "64"], "did you mean --set hidden_size=VALUE[?]"),
        (["train", "--num_hidden_layers=3"], "did you mean --set num_hidden_layers=3[?]"),
        (["generate", "run", "--max-new-tokens", "3", "--temp", "1"], "--max-tokens or --temperature[?]"),
        (["generate", "run", "--promt", "x", "--tok-k=3"], "did you mean --prompt or --top-k[?]"),
        (["train", "--no-such"], "train: unknown option --no-such; see"),
        (["info", "--hidden-size=8"], "did you mean --set hidden_size=8[?]"),
        (["generate", "run", "--hidden-size=8"], "unknown option --hidden-size; see"),
        # words too many, and too few
        (["info", "tiny", "150m"], "info: unexpected '150m'"),
        (["train", "text"], "train: unexpected 'text'"),
        (["train", "--stream=1"], "train: unexpected '1'"),
        (["generate"], r"generate: RUN \(a run folder, .*\) is missing; see hgrn2 generate --help$"),
        (["convert", "a", "--to", "hf"], r"convert: OUT \(.*\) is missing"),
        (["convert"], r"convert: SOURCE \(.*\) and OUT \(.*\) are missing"),
        (["train", "--max-steps"], "--max-steps: its value is missing; see"),
        # choices
        (["train", "--schedule", "linear"], "is 'linear'; wanted constant, cosine, inverse-sqrt or wsd; see"),
        (["train", "--schedule", "cosin"], "did you mean cosine[?] wanted constant, "),
        (["train", "--precision", "fp8"], "--precision is 'fp8'; wanted bfloat16 or float32;"),
        (["train", "--optimizer", ""], "--optimizer is ''; wanted adamw or muon;"),
        (["train", "--optimizer", "x\x1b[31m"], "--optimizer is 'x\ufffd"),
        (["convert", "a", "b", "--to", "gguf"], "--to is 'gguf'; wanted fla, hf, native or official;"),
        (["convert", "a", "b", "--dtype", "int8"], "--dtype is 'int8'; wanted bfloat16, float16, float32 or same;"),
        (["convert", "a", "b"], "--to is missing; wanted "),
        (["generate", "a", "--checkpoint", "best!"], "did you mean best[?]"),
        (["info", "7b"], "model '7b': no such preset, file or folder; did you mean '2.7b'[?]$"),
        (["info", "gpt"], "no such preset, file or folder; presets are tiny, .*, 2.7b$"),
        (["info", "--set", "hidden_size=8"], "--set .* name it before"),
        # places
        (["generate", ""], "RUN: '' is not a path"),
        (["convert", "x", "", "--to", "hf"], "SOURCE or OUT: '' is not a path"),
        (["generate", "\udcff"], "no model there"),
        (["generate", "x\x1by\nz"], "x\ufffdy\ufffdz: no model there"),
        (["generate", "file"], "file: no model there"),
        (["plot", "folder"], "folder/metrics.jsonl: no such file"),
        (["info", "file"], "file: not JSON"),
        (["eval", "folder", "file"], "folder: no model there"),
        (["tokenizer", "file"], "file: cannot be written"),
        (["tokenizer", "new", "--data", "folder"], "folder"),
        (["tokenizer", "new", "--vocab-size", HUGE], "wanted at most 16777216"),
        (["train", "--out", "file/x"], "file/x: cannot be written"),
        (["train", "--out", "/dev/null/x"], "cannot be written"),
        (["train", "--resume", "folder"], "folder: no run to resume there"),
        (["train", "--from", "file"], "file: no model there"),
        (["train", "--config", "folder"], "folder: cannot be read"),
        (["train", "--data", "file"], "file: the file is empty"),
        (["train", "--data", "none-*.txt"], "none-"),
        (["train", "--data", ""], "wanted a text that is not empty"),
        (["train", "--validation", "nothing"], "nothing"),
        # numbers
        (["train", "--max-steps", "1e3"], "--max-steps: '1e3' is not a whole number; see hgrn2 train --help$"),
        (["train", "--max-steps", ""], "--max-steps: '' is not a whole number"),
        (["train", "--max-steps", "-1"], "max_steps is -1; wanted more than 0"),
        (["train", "--max-steps", HUGE], "max_steps has 400 digits; wanted less than 2.63"),
        (["train", "--validation-every", HUGE], "wanted less than 2.63"),
        (["train", "--batch-size", "99999999"], "tokens per step"),
        (["train", "--seed", HUGE], "wanted less than 2.64"),
        (["train", "--learning-rate", "fast"], "--learning-rate: 'fast' is not a number"),
        (["train", "--learning-rate", "NaN"], "learning_rate is nan; wanted a finite number"),
        (["train", "--learning-rate", HUGE], "learning_rate is inf; wanted a finite number"),
        (["train", "--weight-decay", "-1"], "weight_decay is -1.0; wanted 0 or more"),
        (["train", "--beta1", "1"], "beta1 is 1.0; wanted 0 <= beta1 < 1"),
        (["generate", "x", "--temperature", "nan"], "temperature is nan"),
        (["generate", "x", "--top-p", "-inf"], "top_p is -inf"),
        (["generate", "x", "--seed", HUGE], "seed is 9+; wanted"),
        (["info", "tiny", "--seq-len", "-5"], "--seq-len is -5"),
        (["eval", "x", "file", "--window", "x"], "--window: 'x' is not a whole number"),
        (["eval", "x", "--tasks", "a", "--limit", "0"], "--limit is 0"),
        # settings of the model
        (["train", "--set", "=3"], "--set =3: wanted KEY=VALUE"),
        (["train", "--set", "a\x1bb=3"], r"unknown key 'a\\x1bb'"),
        (["train", "--set", "hidden_size="], "hidden_size is ''"),
        (["train", "--set", "hidden_size=null"], "hidden_size is None; wanted a whole number"),
        (["train", "--set", "num_hidden_layers=0"], "num_hidden_layers is 0"),
        (["train", "--set", "use_lower_bound=maybe"], "use_lower_bound is 'maybe'; wanted true or false"),
        # what does not go together
        (["train", "--resume", "x", "--model", "tiny"], "drop --model"),
        (["train", "--teacher", "x", "--stream"], "a teacher reads packed documents"),
        (["convert", "a", "b", "--to", "hf", "--copy-qv"], "go with --from-transformer"),
        (["eval", "x", "file", "--tasks", "y"], "for tasks, .*: for texts"),
        # devices
        (["train", "--device", "gpu0"], "device 'gpu0' is not known; wanted auto"),
        (["train", "--device", ""], "device '' is not known"),
        (["generate", "x", "--device", "cpu:1"], "device 'cpu:1' cannot be used: there is one CPU"),
    ],
)  # fmt: skip
def test_a_mistake_draws_one_line(args, message, capsys):
    if args[0] == "train" and "--data" not in args and "--resume" not in args:
        args = [*args, "--data", "text"]
    assert re.search(message, error_of(capsys, args))


@pytest.mark.parametrize("command", [["train", "--data", "text"], ["generate", "x"], ["eval", "x", "file"]])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_no_gpu(command, device, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = error_of(capsys, [*command, "--device", device])
    assert error == f"error: device '{device}' cannot be used: no CUDA here; use cpu"


def test_fewer_gpus_than_named(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    error = error_of(capsys, ["train", "--data", "text", "--device", "cuda:2"])
    assert error == "error: device 'cuda:2' cannot be used: the last GPU here is cuda:1; use cuda"
    assert "did you mean cuda?" in error_of(capsys, ["train", "--data", "text", "--device", "gpu"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_ctrl_c_is_quiet_in_every_command(name, capsys, monkeypatch):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    # the first thing that each does
    for work in (
        "train.read_toml", "generate.load", "evaluate.load", "info.model_config", "convert.convert_model",
        "tokenizer.check_writable_folder", "task.find_task", "compare.read_toml_file", "chat.load", "serve.load",
    ):  # fmt: skip
        monkeypatch.setattr(f"hgrn2.cli.{work}", interrupted)
    monkeypatch.setattr("hgrn2.train.report.write_report", interrupted)
    words = {"info": ["tiny"], "convert": ["x", "y", "--to", "hf"], "eval": ["x", "file"], "train": []}
    assert cli.main([name, *words.get(name, ["x"])]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["task", "image"], ("task 'image'", "lra-listops", "mqar")),
        (["task", "lra-listops", "--seed", "5"], ("--seed is 5", "lra-listops")),
        (["task", "lra-pathfinder", "--start", "-4"], ("--start is -4",)),
        (["task", "mqar", "--samples", "-1"], ("--samples is -1",)),
    ],
)
def test_samples_that_a_task_does_not_have(capsys, args, parts):
    error = error_of(capsys, args)
    assert all(part in error for part in parts), error
