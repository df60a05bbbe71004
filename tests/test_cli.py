# pyright: reportOptionalMemberAccess=false

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

import hgrn2.data
import hgrn2_command
from hgrn2 import cli
from hgrn2.data.settings import data_settings, prepare_data
from hgrn2.formats.run_folder import checkpoints_of
from hgrn2.models import HGRN2Config
from hgrn2.storage.staging import staged_directory
from hgrn2.train.metrics import read_metrics

MODEL = ["hidden_size=16", "num_hidden_layers=2", "expand_ratio=8", "intermediate_size=24"]
SHORT = ["--max-steps", "10", "--batch-size", "2", "--seq-len", "32", "--validation-tokens", "500"]
TRAIN = ["--tokenizer", "bytes", "--device", "cpu", *SHORT, "--set", *MODEL]


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(8):
        text = "".join(f"def f{k}(x):\n    return x + {i * k}  # é\n\n" for k in range(12))
        (folder / f"{i}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A short run; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("runs") / "run"
    args = ["train", "--data", str(corpus), "--out", str(out), "--checkpoint-every", "4", *TRAIN]
    assert cli.main(args) == 0
    return out


def copy_of(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def refused(capsys, args, message):
    """The command fails in one line, with status 2."""
    capsys.readouterr()
    assert cli.main([str(arg) for arg in args]) == 2
    found = capsys.readouterr()
    # news of prepared data and of the budget may come before it
    *news, error = found.err.splitlines()
    assert all(line.startswith(("prepared ", "reusing ", "no budget given: ")) for line in news), found.err
    assert error.startswith("error: "), found.err
    assert re.search(message, error), found.err


def process(*args, path=(), ctrl_c=signal.default_int_handler, **settings):
    """The command as its installed script starts it; modules are looked for in path first."""
    path = os.pathsep.join(map(str, [*path, Path(hgrn2_command.__file__).parent]))
    return subprocess.Popen(
        [sys.executable, "-c", "import sys, hgrn2_command; sys.exit(hgrn2_command.main())", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        # a shell's background jobs ignore Ctrl-C, and a child inherits that
        preexec_fn=lambda: signal.signal(signal.SIGINT, ctrl_c),
        **settings,
    )  # fmt: skip


# from text to text


@pytest.mark.slow
def test_a_run_leaves_what_it_should(run):
    assert {"config.json", "metrics.jsonl", "checkpoints", "plots", "bytes_tokenizer.json"} <= set(os.listdir(run))
    last = [r for r in read_metrics(run) if r["kind"] == "validation"][-1]
    assert last["step"] == 10
    assert 0 < last["val_bits_per_byte"] < 9
    config = json.loads((run / "config.json").read_text())
    assert HGRN2Config.from_dict(config["model"]).vocab_size == 257
    assert not [p for p in listing(run) if "tmp" in p]


def test_resuming_with_more_steps(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path)
    assert cli.main(["train", "--resume", str(copy), "--max-steps", "12"]) == 0
    out = capsys.readouterr().out
    assert "picture" in out
    assert "bits per byte" in out
    assert [r["step"] for r in read_metrics(copy) if r["kind"] == "train"][-1] == 12
    # another setting that was not named is as it was
    assert json.loads((copy / "config.json").read_text())["train"]["seq_len"] == 32


def test_generate(run, capsys):
    capsys.readouterr()
    args = ["generate", str(run), "--prompt", "def ", "--max-tokens", "20", "--seed", "1"]
    texts = []
    for _ in range(2):
        assert cli.main(args) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("def ")
    assert texts[0].endswith("\n")
    for which in ("latest", "best"):
        assert cli.main([*args, "--checkpoint", which]) == 0
    assert cli.main(["generate", str(checkpoints_of(run)[0]), "--max-tokens", "3"]) == 0


def test_generate_in_two_parts(run, tmp_path, capsys):
    def write(*args):
        capsys.readouterr()
        assert cli.main(["generate", str(run), "--temperature", "0", *map(str, args)]) == 0
        return capsys.readouterr().out[:-1]

    whole = write("--prompt", "def f", "--max-tokens", 12)
    first = write("--prompt", "def f", "--max-tokens", 5, "--state-out", tmp_path / "state")
    second = write("--max-tokens", 7, "--state-in", tmp_path / "state")
    if "\ufffd" not in whole:
        assert first + second == whole
    assert (tmp_path / "state").exists()


def test_eval(run, corpus, tmp_path, capsys):
    capsys.readouterr()
    files = [str(corpus / "0.txt"), str(corpus / "1.txt")]
    assert cli.main(["eval", str(run), *files, "--json-out", str(tmp_path / "scores.json")]) == 0
    assert "bits/byte" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    texts, total = scores["texts"], scores["total"]
    assert [row["name"] for row in texts] == ["0.txt", "1.txt"]
    assert total["num_bytes"] == sum((corpus / f"{i}.txt").stat().st_size for i in range(2))
    assert total["nats"] == pytest.approx(texts[0]["nats"] + texts[1]["nats"])


def test_eval_has_a_row_a_file(run, tmp_path, capsys):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(5)))
    (tmp_path / "a.txt").write_text("a text")
    out, files = tmp_path / "scores.json", [str(tmp_path / name) for name in ("d.jsonl", "a.txt")]
    for flags, names in [([], ["a.txt", "d.jsonl"]), (["--each"], ["a.txt", *(f"d.jsonl#{i}" for i in range(1, 6))])]:
        capsys.readouterr()
        assert cli.main(["eval", str(run), *files, *flags, "--json-out", str(out)]) == 0
        scores = json.loads(out.read_text())
        assert [row["name"] for row in scores["texts"]] == names
        assert scores["total"]["num_bytes"] == 36
        shown = capsys.readouterr().out
        assert all(name in shown for name in [*names, "total"])


def test_bits_a_byte_are_not_available_where_words_are_lost(corpus, tmp_path, capsys):
    from tests.data import families

    families.make("wordlevel").save(tmp_path)
    flags = ["--tokenizer", str(tmp_path), *TRAIN[2:]]
    assert cli.main(["train", "--data", str(corpus), "--out", "run", *flags, "--compressors"]) == 0
    shown = capsys.readouterr()
    assert "tokens stand for text that the tokenizer does not know" in shown.err
    assert "held-out text: bits per byte n/a (the tokenizer does not keep the whole text), perplexity" in shown.out
    records = [record for record in read_metrics(Path("run")) if record["kind"] == "validation"]
    assert [record["val_bits_per_byte"] for record in records] == [None] * len(records) != []
    assert cli.main(["eval", "run", str(corpus / "0.txt"), "--json-out", "scores.json"]) == 0
    shown = capsys.readouterr()
    assert "n/a" in shown.out
    assert "0.txt: " in shown.err
    assert "stand for text that the tokenizer does not know" in shown.err
    assert json.loads(Path("scores.json").read_text())["total"]["bits_per_byte"] is None


def test_a_prompt_from_standard_input(run, capsys, monkeypatch, tmp_path):
    def write(*args):
        capsys.readouterr()
        assert cli.main(["generate", str(run), "--temperature", "0", "--max-tokens", "5", *args]) == 0
        return capsys.readouterr().out

    wanted = write("--prompt", "def f")
    (tmp_path / "prompt").write_text("def f\n")
    with (tmp_path / "prompt").open() as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        assert write() == wanted
        assert write("--prompt", "x").startswith("x")
    for data, message in [(b"\xff", "standard input is not UTF-8"), (b"a\0", "standard input is binary")]:
        (tmp_path / "prompt").write_bytes(data)
        with (tmp_path / "prompt").open() as piped:
            monkeypatch.setattr(sys, "stdin", piped)
            refused(capsys, ["generate", run], message)


def test_control_characters_are_shown_to_a_terminal(run, tmp_path, capsys, monkeypatch):
    name = tmp_path / "red\x1b[31m\u202e.txt"
    name.write_text("a text")
    assert cli.main(["eval", str(run), str(name)]) == 0
    (tmp_path / "d.jsonl").write_text('{"\\u001b[31m\\n": 1}\n')
    refused(capsys, ["eval", run, tmp_path / "d.jsonl"], "no field 'text'")
    monkeypatch.setattr("hgrn2.inference.writing.Writer.write", lambda *args: iter(["a\x1b[2Jb\r\n"]))
    capsys.readouterr()
    assert cli.main(["generate", str(run), "--prompt", "\x07"]) == 0
    # a pipe gets what the model wrote
    assert capsys.readouterr().out == "\x07a\x1b[2Jb\r\n\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["generate", str(run), "--prompt", "\x07"]) == 0
    assert capsys.readouterr().out == "\ufffda\ufffd[2Jb\ufffd\n\n"


def test_the_end_of_a_text_is_said(run, capsys, monkeypatch):
    monkeypatch.setattr("hgrn2.data.ByteTokenizer.end_ids", frozenset(range(257)))
    capsys.readouterr()
    assert cli.main(["generate", str(run), "--prompt", "a"]) == 0
    assert "ended by end-of-text after 1 of 256 tokens" in capsys.readouterr().err


def test_plot_and_info(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path)
    shutil.rmtree(copy / "plots")
    capsys.readouterr()
    assert cli.main(["plot", str(copy)]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert Path(line).stat().st_size > 1000
    for model in (run, checkpoints_of(run)[0], "1.3b"):
        assert cli.main(["info", str(model)]) == 0
    assert "1,364,396,032" in capsys.readouterr().out
    (tmp_path / "model.json").write_text(json.dumps({"hidden_size": 64, "expand_ratio": 8}))
    assert cli.main(["info", str(tmp_path / "model.json"), "--set", "vocab_size=99"]) == 0
    assert "vocabulary 99" in capsys.readouterr().out


@pytest.mark.slow
def test_a_hybrid_trains_and_carries_its_state(corpus, tmp_path, capsys):
    hybrid = 'attn={"layers":[1],"num_heads":2,"window_size":16}'
    for flags in ([], ["--stream"]):
        args = ["--out", tmp_path / f"run{len(flags)}", *flags, *TRAIN, hybrid, "--max-steps", "4"]
        assert cli.main(["train", "--data", str(corpus), *map(str, args)]) == 0, capsys.readouterr().err


def test_settings_from_a_file(corpus, tmp_path):
    (tmp_path / "run.toml").write_text(
        "[model]\npreset = 'tiny'\nhidden_size = 16\nnum_hidden_layers = 1\nexpand_ratio = 8\nintermediate_size = 24\n"
        "[train]\nmax_steps = 50\nbatch_size = 2\nseq_len = 16\nvalidation_tokens = 100\ndevice = 'cpu'\n"
        f"[data]\ndata = ['{corpus}']\ntokenizer = 'bytes'\n"
    )
    out = tmp_path / "run"
    args = ["--config", str(tmp_path / "run.toml"), "--out", str(out), "--max-steps", "2", "--set", "dropout=0.1"]
    assert cli.main(["train", *args]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["train"]["max_steps"], config["train"]["seq_len"]) == (2, 16)
    assert (config["model"]["num_hidden_layers"], config["model"]["dropout"]) == (1, 0.1)


def test_tokenizer(corpus, tmp_path, capsys):
    assert cli.main(["tokenizer", str(tmp_path / "bpe"), "--data", str(corpus), "--vocab-size", "280"]) == 0
    assert (tmp_path / "bpe" / "tokenizer.json").exists()
    refused(capsys, ["tokenizer", tmp_path / "bpe", "--data", corpus], "exists already; name another folder")
    refused(capsys, ["tokenizer", tmp_path / "b", "--data", corpus, "--vocab-size", "9"], "at least 257")
    refused(capsys, ["tokenizer", tmp_path / "b", "--data", tmp_path / "nothing"], "nothing")
    assert not (tmp_path / "b").exists()


def test_a_tokenizer_appears_whole_or_not_at_all(corpus, tmp_path, capsys, monkeypatch):
    args = ["tokenizer", tmp_path / "bpe", "--data", corpus, "--vocab-size", "280"]

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        refused(capsys, args, "the disk is full")
    assert not list(tmp_path.iterdir())

    def train_bpe(texts, vocab_size):
        made = hgrn2.data.find_tokenizer.train_bpe(texts, vocab_size)
        (tmp_path / "bpe").mkdir()
        (tmp_path / "bpe" / "tokenizer.json").write_text("another's")
        return made

    monkeypatch.setattr("hgrn2.data.train_bpe", train_bpe)
    refused(capsys, args, "another process has created it meanwhile")
    assert (tmp_path / "bpe" / "tokenizer.json").read_text() == "another's"


def test_prepared_data_is_remembered_from_wherever_it_is_named(corpus, tmp_path, monkeypatch):
    hgrn2.data.prepare(corpus, "bytes", tmp_path / "set")
    _, kept = prepare_data(data_settings({}, data=["set"]), tmp_path / "run", False, lambda tokenizer: None)
    assert kept == {"prepared": str(tmp_path / "set")}


# what cannot be: one line, status 2, nothing left behind


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--max-steps", "0"], "max_steps is 0; wanted more than 0"),
        (["train", "--learning-rate", "nan"], "learning_rate is nan"),
        (["train", "--set", "hidden_size"], "--set hidden_size: wanted KEY=VALUE"),
        (["generate", "nothing"], "nothing: no model there"),
        (["generate", "."], "no model there"),
        (["generate", "nothing", "--max-tokens", "0"], "--max-tokens is 0"),
        (["generate", "nothing", "--top-p", "2"], "top_p is 2.0; wanted"),
        (["generate", "nothing", "--checkpoint", "worst"], "worst"),
        (["generate", "nothing", "--prompt", "\udcff"], "not UTF-8"),
        (["eval", "nothing", "file"], "nothing: no model there"),
        (["eval", "nothing"], "no file to evaluate"),
        (["eval", "nothing", "file", "--window", "0"], "--window is 0"),
        (["plot", "nothing"], "nothing"),
        (["plot", "."], "metrics"),
        (["info", "tinny"], "did you mean 'tiny'"),
        (["info", "."], "no config.json there"),
        (["info", "tiny", "--seq-len", "0"], "--seq-len is 0"),
        (["train", "--resume", "nothing"], "nothing: no run to resume there"),
        (["train", "--config", "nothing.toml"], "nothing.toml: cannot be read"),
        (["train", "--data", "nothing.txt"], "nothing.txt"),
        (["train", "--tokenizer", "nothing.json"], "nothing.json"),
        (["info", "tiny", "--set", f"hidden_size={'[' * 100_000}"], "hidden_size: not JSON .nested too deep"),
        (["info", "tiny", "--set", f"hidden_size={'9' * 5000}"], "hidden_size: not JSON .a number of thousands"),
        (["eval", "nothing", "--tasks", "x", "--batch-size", "9" * 5000], "wanted a number from 1 to 999999999"),
        (["tokenizer", "new", "--vocab-size", "99999999999"], "wanted at most 16777216"),
        (["train", "--tokenizer", "bpe:99999999999"], "wanted at most 16777216"),
        (["train", "--device", "meta"], "'meta' cannot be used"),
        (["train", "--out", ""], "--out: '' is not a path"),
        (["train", "--resume", ""], "--resume: '' is not a path"),
        (["train", "--model", ""], "model '': names nothing"),
        (["train", "--tokenizer", ""], "tokenizer is ''; wanted a text"),
        (["info", ""], "model '': names nothing"),
        (["tokenizer", ""], "'' is not a path"),
        (["generate", "run", "--state-out", ""], "--state-out: '' is not a path"),
    ],
)
def test_refused_in_one_line(args, message, capsys, tmp_path, corpus):
    if args[:1] == ["train"] and "--data" not in args and "--resume" not in args:
        args = [*args, "--data", str(corpus), "--prepared", str(tmp_path / "prepared")]
        (tmp_path / "prepared").mkdir()
    before = listing(tmp_path)
    refused(capsys, args, message)
    kept = [p for p in listing(tmp_path) if not p.startswith("prepared")]
    assert kept == [p for p in before if not p.startswith("prepared")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("hidden_size=abc", "hidden_size is 'abc'; wanted a whole number"),
        ("hiden_size=16", "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ("name=x", "unknown key 'name'"),
        ("dropout=true", "dropout is True; wanted a finite number"),
        ("dropout=NaN", "dropout is nan"),
        ("attn=3", "attn is 3; wanted a table"),
        ('attn={"layers":[9],"num_heads":2}', r"attn.layers holds \[9\]"),
        ("num_heads=3", r"num_heads (= 3 contradicts|is 3; wanted a number that divides hidden_size = 256)"),
        ("vocab_size=100", "tokenizer 'bytes' has 257 tokens but the model has vocab_size 100"),
        ("expand_ratio=7", "not a multiple of expand_ratio = 7"),
    ],
)
def test_model_settings(change, message, capsys, tmp_path, corpus):
    refused(capsys, ["train", "--data", corpus, "--out", tmp_path / "run", *TRAIN, change], message)
    assert not (tmp_path / "run").exists()
    if not change.startswith("vocab"):
        refused(capsys, ["info", "tiny", "--set", change], message)


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "message"),
    [
        ("bytes", 256, "'bytes' has 257 tokens but the model has vocab_size 256"),
        ("bpe:300", 256, "has 257 tokens but the model has vocab_size 256"),
        ("bpe:300", 280, "'bpe:300' has 300 tokens but the model has vocab_size 280"),
    ],
)
def test_a_vocabulary_too_small_is_known_before_the_corpus_is_tokenised(
    tokenizer, vocab_size, message, capsys, tmp_path, corpus, monkeypatch
):
    def encode(*args):
        raise AssertionError("the corpus was tokenised")

    monkeypatch.setattr(sys.modules["hgrn2.data.prepare"], "encode_pieces", encode)
    args = ["train", "--data", corpus, "--out", tmp_path / "run", *TRAIN, f"vocab_size={vocab_size}"]
    refused(capsys, [*args, "--tokenizer", tokenizer], message)
    assert not list(tmp_path.iterdir())


def test_a_window_longer_than_the_corpus(run, capsys, tmp_path, corpus):
    message = "the data has .* tokens, but one window of seq_len 99999 needs 100,000; use a shorter seq_len"
    long = ["--seq-len", "99999"]
    refused(capsys, ["train", "--data", corpus, "--out", tmp_path / "run", *TRAIN, *long], message)
    # the prepared tokens are whole, and good for the next attempt
    assert [p.name for p in tmp_path.iterdir()] == ["prepared"]
    assert cli.main(["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *TRAIN]) == 0
    assert "reusing" in capsys.readouterr().err
    before = {p: (run / p).read_bytes() for p in listing(run) if (run / p).is_file()}
    refused(capsys, ["train", "--resume", run, "--max-steps", "12", *long], message)
    assert before == {p: (run / p).read_bytes() for p in listing(run) if (run / p).is_file()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\n", "unknown key 'modle'; did you mean 'model'"),
        ("model = 3\n", "model is 3; wanted a table"),
        ("[model]\nhiden_size = 3\n", "unknown key 'hiden_size'; did you mean 'hidden_size'"),
        ("[model]\npreset = 'tinny'\n", "did you mean 'tiny'"),
        ("[train]\nlearning_rat = 3\n", "unknown key 'learning_rat'; did you mean 'learning_rate'"),
        ("[train]\nbatch_size = 'x'\n", "batch_size is 'x'"),
        ("[data]\ntokenizr = 'bytes'\n", "unknown key 'tokenizr'; did you mean 'tokenizer'"),
        ("[data]\ndata = 3\n", "data is 3; wanted a text or a list of texts"),
        ("[data]\ntokenizer = ['bytes']\n", "tokenizer is .*; wanted a text"),
        ("[model\n", "not TOML"),
        ("[model]\nhidden_size = " + "[" * 100_000, "not TOML"),
        ("[model]\nhidden_size = " + "9" * 5000, "not TOML"),
        ("[data]\ntokenizer = ''\n", "tokenizer is ''; wanted a text that is not empty"),
        ('[data]\nvalidation = "a\\u0000b"\n', "validation is .*; wanted a text .*without null characters"),
    ],
)
def test_settings_files(text, message, capsys, tmp_path, corpus):
    (tmp_path / "run.toml").write_text(text)
    args = ["train", "--config", tmp_path / "run.toml", "--out", tmp_path / "run", "--prepared", tmp_path / "prepared"]
    if "[data]" not in text:
        args += ["--data", corpus, "--tokenizer", "bytes"]
    refused(capsys, args, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "found list, wanted an object"),
        ("{", "not JSON"),
        ('{"hiden_size": 3}', "did you mean 'hidden_size'"),
        ('{"attn": [1]}', "attn is"),
        ('{"model_type": "llama"}', "model_type is 'llama'"),
    ],
)
def test_model_files(text, message, capsys, tmp_path):
    (tmp_path / "model.json").write_text(text)
    refused(capsys, ["info", tmp_path / "model.json"], message)


def test_a_run_is_not_overwritten(run, corpus, capsys):
    before = {p: (run / p).read_bytes() for p in listing(run) if (run / p).is_file()}
    refused(capsys, ["train", "--data", corpus, "--out", run, *TRAIN], "holds a run already; continue it with --resume")
    assert before == {p: (run / p).read_bytes() for p in listing(run) if (run / p).is_file()}


@pytest.mark.parametrize(
    "flags",
    [["--model", "tiny"], ["--set", "dropout=0"], ["--tokenizer", "bytes"], ["--config", "x.toml"],
     ["--text-field", "x"], ["--rebuild"], ["--out", "x"], ["--out", "runs/run"], ["--validation", "x"]],
)  # fmt: skip
def test_resuming_takes_no_other_data_or_model(flags, run, capsys):
    refused(capsys, ["train", "--resume", run, *flags], f"drop {flags[0]}")


def test_resuming_without_its_data(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    for data, message in [
        ({}, "does not say where the prepared data is"),
        (None, "does not say"),
        ({"prepared": str(tmp_path / "gone")}, "gone: the prepared tokens .* --prepared, or .* --data"),
    ]:
        # as older runs have it
        config.pop("hgrn2_digest", None)
        (copy / "config.json").write_text(json.dumps(config | {"data": data}))
        refused(capsys, ["train", "--resume", copy], message)


def test_damaged_checkpoints(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path)
    newest = checkpoints_of(copy)[-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    text = tmp_path / "text.txt"
    text.write_text("some text")
    for args in (["generate", copy], ["eval", copy, text], ["train", "--resume", copy, "--max-steps", "20"]):
        refused(capsys, args, r"model.safetensors is truncated or was changed .*checkpoints/step-")
    weights.unlink()
    refused(capsys, ["generate", newest], "no model there|missing")
    (checkpoints_of(copy)[0] / "config.json").write_text("{}")
    refused(capsys, ["generate", checkpoints_of(copy)[0]], "config.json is truncated or was changed")


@pytest.mark.parametrize(
    "change",
    [{"rng": {}}, {"rng": None}, {"step": "10"}, {"tokens": None}, {"best": {}}, {"best": 3}, {"task": {}},
     {"freezing": []}],
)  # fmt: skip
def test_a_state_that_no_run_has_written(change, run, tmp_path, capsys):
    copy = copy_of(run, tmp_path)
    older = checkpoints_of(copy)[0]
    state = json.loads((older / "state.json").read_text()) | change
    (older / "state.json").write_text(json.dumps(state))
    sums = {name: hashlib.sha256((older / name).read_bytes()).hexdigest() for name in os.listdir(older)}
    (older / "SHA256SUMS").write_text("".join(f"{sums[name]}  {name}\n" for name in sums if name != "SHA256SUMS"))
    before = checkpoints_of(copy)
    refused(capsys, ["train", "--resume", older, "--max-steps", "20"], "state.json|data position")
    assert checkpoints_of(copy) == before


def test_texts_that_are_none(run, tmp_path, capsys):
    for name, data, message in [
        ("empty", b"", "the file is empty"),
        ("binary", b"ab\0cd", "binary, not text"),
        ("latin", b"caf\xe9 ol\xe9", "not UTF-8"),
    ]:
        (tmp_path / name).write_bytes(data)
        refused(capsys, ["eval", run, tmp_path / name, "--json-out", tmp_path / "scores.json"], message)
        out = tmp_path / "run"
        refused(capsys, ["train", "--data", tmp_path / name, "--out", out, *TRAIN], name)
    refused(capsys, ["eval", run, tmp_path / "missing"], "missing")
    (tmp_path / "short.txt").write_text("tiny")
    refused(capsys, ["train", "--data", tmp_path / "short.txt", "--out", tmp_path / "run", *TRAIN], "short")
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "prepared") == [
        "binary", "empty", "latin", "short.txt"
    ]  # fmt: skip


def test_where_nothing_can_be_written(run, corpus, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    refused(
        capsys,
        ["train", "--data", corpus, "--out", tmp_path / "file" / "run", *TRAIN],
        "cannot|not a (directory|folder)",
    )
    refused(capsys, ["generate", run, "--state-in", tmp_path / "file"], "contains no readable state")


@pytest.mark.parametrize("place", ["none/file", "file/file", "folder", "x" * 254, os.devnull])
def test_where_no_file_can_be_written_is_known_before_the_work(place, run, corpus, tmp_path, capsys, monkeypatch):
    def work(*args):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(cli.generate, "load", work)
    monkeypatch.setattr(cli.evaluate, "load", work)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = listing(tmp_path)
    refused(capsys, ["eval", run, corpus / "0.txt", "--json-out", place], "cannot be written")
    refused(capsys, ["generate", run, "--state-out", place], "cannot be written")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("place", ["file", "file/folder", "x" * 256])
def test_where_no_folder_can_be_made_is_known_before_the_work(place, corpus, tmp_path, capsys, monkeypatch):
    def work(*args):
        raise AssertionError("the data was read")

    monkeypatch.setattr("hgrn2.data.open_corpus", work)
    monkeypatch.setattr("hgrn2.cli.new_run.prepare_data", work)
    (tmp_path / "file").write_text("")
    refused(capsys, ["train", "--data", corpus, "--out", place, *TRAIN], "cannot be written .*name another folder")
    refused(capsys, ["tokenizer", place, "--data", corpus], "cannot be written .*name another folder")
    assert listing(tmp_path) == ["file"]


# outputs that take nothing, and signals


def full_device():
    return open("/dev/full", "w")


def closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_output(run, corpus, capsys, monkeypatch):
    for args in (["info", "tiny"], ["plot", run], ["eval", run, corpus / "0.txt"], ["generate", run], ["--help"]):
        with full_device() as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            refused(capsys, args, "No space left on device; check free space and the output destination")


def test_an_output_without_a_reader_keeps_the_other_results(run, corpus, tmp_path, monkeypatch, capsys):
    for args in (
        ["eval", run, corpus / "0.txt", "--json-out", tmp_path / "scores.json"],
        ["generate", run, "--temperature", "0", "--state-out", tmp_path / "state"],
    ):
        with closed_pipe() as pipe, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", pipe)
            assert cli.main([str(arg) for arg in args]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())
    assert cli.main(["generate", str(run), "--max-tokens", "3", "--state-in", str(tmp_path / "state")]) == 0
    assert capsys.readouterr().err == ""


def test_a_run_is_not_done_because_a_reader_has_gone(corpus, tmp_path, monkeypatch):
    def start(*args, **settings):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("hgrn2.train.runs.start_language_run", start)
    args = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *TRAIN]
    with closed_pipe() as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", pipe)
        assert cli.main(args) == 2
    # what had been said before did not end it
    assert (tmp_path / "prepared").is_dir()


def test_no_outputs_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    try:
        assert cli.main(["info", "tiny"]) == 0
        assert cli.main(["info", "tinny"]) == 2
        assert cli.main(["--help"]) == 0
    finally:
        sys.stdout.close()
        sys.stderr.close()


def test_a_signal_while_flags_are_read(monkeypatch):
    def ended(*args, **settings):
        raise SystemExit(143)

    monkeypatch.setattr("tyro.cli", ended)
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "tiny"])
    assert stop.value.code == 143


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.\nTried"),
     RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")],
)  # fmt: skip
def test_a_lack_of_memory(error, capsys, monkeypatch):
    def load(*args):
        raise error

    monkeypatch.setattr(cli.generate, "load", load)
    refused(capsys, ["generate", "run"], "out of memory.*lower batch_size or seq_len")


def test_a_mistake_of_ours_is_not_called_a_lack_of_memory(monkeypatch):
    def load(*args):
        raise RuntimeError("shapes")

    monkeypatch.setattr(cli.generate, "load", load)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["generate", "run"])


# as a process


@pytest.mark.slow
def test_a_closed_pipe(run):
    # the likeliest token is never the end of the text here, sampling would meet it soon
    writing = process("generate", run, "--max-tokens", 100_000, "--prompt", "x\n", "--temperature", 0)
    assert writing.stdout.readline() == "x\n"
    writing.stdout.close()
    try:
        assert writing.wait(60) == 0
        assert writing.stderr.read() == ""
    finally:
        writing.kill()
        writing.stderr.close()


@pytest.mark.slow
def test_ctrl_c(run, tmp_path):
    writing = process(
        "generate", run, "--max-tokens", 1_000_000, "--prompt", "x\n", "--temperature", 0, "--state-out",
        tmp_path / "state",
    )  # fmt: skip
    assert writing.stdout.readline() == "x\n"
    time.sleep(0.2)
    writing.send_signal(signal.SIGINT)
    try:
        _, errors = writing.communicate(timeout=60)
        assert "Traceback" not in errors
        # a shell shows 130 for both; Python ends itself by the signal if it came during an import
        assert writing.returncode in (130, -signal.SIGINT)
    finally:
        writing.kill()
        writing.communicate()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_tidy_up_as_well(number, tmp_path, monkeypatch):
    def killed():
        with staged_directory(tmp_path / "out") as stage:
            (stage / "half").touch()
            os.kill(os.getpid(), number)

    # main takes all of them
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(each, signal.SIG_DFL) for each in numbers]
    monkeypatch.setattr(cli, "main", killed)
    try:
        with pytest.raises(SystemExit) as ended:
            hgrn2_command.main()
        assert ended.value.code == 128 + number
        assert not list(tmp_path.iterdir())
        # one that is ignored, as by nohup, stays so
        signal.signal(number, signal.SIG_IGN)
        monkeypatch.setattr(cli, "main", lambda: 7)
        assert hgrn2_command.main() == 7
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        for each, handler in zip(numbers, before, strict=True):
            signal.signal(each, handler)


@pytest.mark.parametrize(("ctrl_c", "status"), [(signal.default_int_handler, -signal.SIGINT), (signal.SIG_IGN, 7)])
def test_ctrl_c_while_it_still_imports(ctrl_c, status, tmp_path):
    (tmp_path / "torch.py").write_text(
        # until the end of its input
        "import sys\nprint('importing', flush=True)\nsys.stdin.read()\nsys.exit(7)\n"
    )
    starting = process("info", "tiny", path=[tmp_path], ctrl_c=ctrl_c, stdin=subprocess.PIPE)
    assert starting.stdout.readline() == "importing\n"
    starting.send_signal(signal.SIGINT)
    try:
        # a job of a shell's that ignores Ctrl-C goes on ignoring it
        assert starting.communicate(timeout=60) == ("", "")
        assert starting.returncode == status
    finally:
        starting.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_the_process_exits(number):
    # a callback of Python's exit in which it comes would show its exception
    script = (
        "import atexit, os, sys, time, hgrn2_command\n"
        f"atexit.register(lambda: (os.kill(os.getpid(), {int(number)}), time.sleep(10)))\n"
        "sys.exit(hgrn2_command.main())"
    )
    ending = subprocess.run(
        [sys.executable, "-c", script, "info", "tinny"], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert ending.returncode == -number
    assert re.fullmatch(r"error: [^\n]*tinny[^\n]*\n", ending.stderr)


def test_the_installed_command_is_the_one_tested_here():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"hgrn2": "hgrn2_command:main"}


@pytest.mark.slow
def test_an_error_as_a_process():
    failing = process("info", "tinny")
    out, errors = failing.communicate(timeout=60)
    assert failing.returncode == 2
    assert out == ""
    assert re.fullmatch(r"error: [^\n]*did you mean 'tiny'[^\n]*\n", errors)
