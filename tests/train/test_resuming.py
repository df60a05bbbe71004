"""A resumed run keeps its position, its settings and its data, and knows that it has ended."""

import contextlib
import json
import os
import shutil
import warnings
from unittest import mock

import pytest

from hgrn2 import cli
from hgrn2.data.prepared import PreparedData
from hgrn2.errors import UserError
from hgrn2.formats import run_folder
from hgrn2.train.config import TrainConfig
from hgrn2.train.metrics import read_metrics
from hgrn2.train.schedule import lr_fraction

MODEL = ["hidden_size=16", "expand_ratio=8", "num_hidden_layers=1", "intermediate_size=16"]
FLAGS = ["--tokenizer", "bytes", "--batch-size", "1", "--seq-len", "8", "--device", "cpu", "--set", *MODEL]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with text and a run of 4 steps, as a person would have it."""
    home = tmp_path_factory.mktemp("home") / "one"
    (home / "notes").mkdir(parents=True)
    for i in range(6):
        (home / "notes" / f"{i}.txt").write_text(f"a small text, number {i}\n")
    before = os.getcwd()
    os.chdir(home)
    try:
        status = cli.main(
            ["train", "--data", "notes", "--max-steps", "4", "--checkpoint-every", "2", "--out", "runs/m", *FLAGS]
        )
    finally:
        os.chdir(before)
    assert status == 0
    return home


@pytest.fixture
def home(original, tmp_path, monkeypatch):
    """The run folder, moved; the old place no longer exists."""
    place = shutil.copytree(original, tmp_path / "two")
    hidden = original.with_name("hidden")
    original.rename(hidden)
    monkeypatch.chdir(place)
    yield place
    hidden.rename(original)


def resume(*flags, draws=False):
    # drawing takes longer than all the rest
    with contextlib.ExitStack() as stack:
        if not draws:
            stack.enter_context(mock.patch("hgrn2.train.plots.plot_run", return_value=[]))
        return cli.main(["train", "--resume", "runs/m", *map(str, flags)])


def edit(path, change, keep_digest=False):
    values = json.loads(path.read_text())
    change(values)
    if not keep_digest:
        del values["hgrn2_digest"]
    path.write_text(json.dumps(values))


def settings(run="runs/m"):
    with open(f"{run}/config.json", encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.slow
def test_a_run_that_was_moved_with_its_tokens(home):
    assert settings()["data"]["prepared"].startswith("../prepared/notes-")
    assert resume("--max-steps", 5) == 0
    assert read_metrics(home / "runs/m")[-1]["step"] == 5


def test_tokens_that_were_moved_elsewhere(home, capsys):
    place = next((home / "runs/prepared").iterdir())
    place.rename(home / "elsewhere")
    assert resume("--max-steps", 5) == 2
    assert "are not there; name their folder with --prepared, or the text" in capsys.readouterr().err
    assert resume("--max-steps", 5, "--prepared", "elsewhere") == 0
    # from then on they are looked for there
    assert resume("--max-steps", 6) == 0


def test_text_that_was_moved_is_prepared_again(home, capsys):
    shutil.rmtree("runs/prepared")
    os.rename("notes", "texts")
    os.mkdir("in")
    os.rename("texts", "in/notes")
    assert resume("--max-steps", 5, "--data", "in/notes") == 0
    shutil.rmtree("runs/prepared")
    with open("in/notes/0.txt", "w", encoding="utf-8") as file:
        file.write("another text")
    assert resume("--max-steps", 6, "--data", "in/notes") == 2
    assert "tokens are not those that" in capsys.readouterr().err


def test_a_copy_of_a_run_finds_the_tokens_beside_the_original(original, tmp_path):
    copy = shutil.copytree(original / "runs" / "m", tmp_path / "copy")
    assert cli.main(["train", "--resume", str(copy), "--max-steps", "5"]) == 0


def test_an_older_run_that_was_moved(home):
    def as_it_was(config):
        config["data"] = {"prepared": str(home.parent / "gone" / "prepared" / os.listdir("runs/prepared")[0])}
        config["train"]["warmup_steps"] = None

    edit(home / "runs/m/config.json", as_it_was)
    assert resume("--max-steps", 5) == 0
    assert settings()["train"]["warmup_steps"] == 0


def test_other_validation_tokens_are_refused(home, capsys):
    place = next((home / "runs/prepared").iterdir())
    assert PreparedData.open(place).validation.fingerprint == settings()["data"]["fingerprints"]["validation"]
    edit(home / "runs/m/config.json", lambda config: config["data"]["fingerprints"].update(validation="x"))
    assert resume("--max-steps", 5) == 2
    assert "its validation tokens are not those that" in capsys.readouterr().err


def test_a_run_that_has_ended_is_left_as_it_is(home, capsys):
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    for flags in ([], ["--max-steps", 3]):
        assert resume(*flags) == 0
        shown = capsys.readouterr()
        wanted = f"finished: 4 of {flags[1] if flags else 4} steps used; to continue, give a larger total budget: "
        assert wanted + "--max-steps N" in shown.err
        # the report is named, as at the end of every run
        assert shown.out.startswith("report   ")
        assert shown.out.count("\n") == 1
    assert before == {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    # pictures that were not drawn are still to come
    shutil.rmtree("runs/m/plots")
    assert resume(draws=True) == 0
    assert "picture  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["model"].update(norm_eps=0.1),
            "the model is not that of step-00000004: norm_eps is 0.1, there 1e-06",
        ),
        (lambda c: c["model"].update(q_activation="sigmoid"), "q_activation is 'sigmoid', there 'silu'"),
    ],
)
def test_another_model_than_the_checkpoints_is_refused(home, capsys, change, message):
    before = run_folder.checkpoints_of(home / "runs/m")
    edit(home / "runs/m/config.json", change, keep_digest=True)
    assert resume("--max-steps", 5) == 2
    assert "damaged or edited (its content does not match its hgrn2_digest)" in capsys.readouterr().err
    # as older runs have it
    edit(home / "runs/m/config.json", lambda config: None)
    assert resume("--max-steps", 5) == 2
    assert message in capsys.readouterr().err
    assert run_folder.checkpoints_of(home / "runs/m") == before


def test_changed_settings_are_named(home, capsys):
    edit(home / "runs/m/config.json", lambda config: config["train"].update(learning_rate=0.5))
    assert resume("--max-steps", 6, "--clip-norm", 2) == 0
    shown = capsys.readouterr().err
    assert "settings changed since step 4: max_steps 4 -> 6, learning_rate 0.001 -> 0.5, clip_norm 1.0 -> 2.0" in shown


def test_a_learning_rate_that_goes_up_again_is_said(home, capsys):
    assert resume("--max-steps", 100) == 0
    assert "the learning rate goes up from 0.0001 to " in capsys.readouterr().err
    # the warmup is that of the first budget, of which it was a tenth
    assert settings()["train"]["warmup_steps"] == 0


def test_a_longer_budget_leaves_inverse_sqrt_alone():
    rates = []
    for budget in (20, 30, 2000):
        config = TrainConfig(schedule="inverse-sqrt", max_steps=budget)
        rates.append(lr_fraction(config, 20, 20 / budget))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            # as a run keeps it
            assert lr_fraction(config.resolved(1), 20, 20 / budget) == rates[0]
        assert len(said) == (budget < 100)
    assert rates == [rates[0]] * 3


@pytest.mark.slow
def test_a_warmup_longer_than_the_budget_is_lowered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("a small text\n" * 20)
    (tmp_path / "c.toml").write_text("[train]\nwarmup_steps = 20\n")
    flags = ["--config", "c.toml", "--data", "notes.txt", "--max-steps", "10", "--out", "runs/w", *FLAGS]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["train", *flags]) == 0
    shown = capsys.readouterr().err
    assert shown.count("a warmup of 20 steps is longer than max_steps 10; lowered to 1") == 1
    assert settings("runs/w")["train"]["warmup_steps"] == 1


def test_no_budget_is_said(tmp_path, monkeypatch, capsys):
    def start(*args, **options):
        raise UserError("far enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hgrn2.train.runs.start_language_run", start)
    (tmp_path / "notes.txt").write_text("a small text\n" * 20)
    assert cli.main(["train", "--data", "notes.txt", *FLAGS]) == 2
    assert "\nno budget given: 1,000 steps; " in capsys.readouterr().err


def test_a_changed_tokenizer_of_a_run_is_refused(home, capsys):
    (home / "runs/m/bytes_tokenizer.json").write_text('{"format": "hgrn2-tokenizer",  "name": "bytes"}')
    assert cli.main(["generate", "runs/m", "--max-tokens", "2"]) == 2
    assert "bytes_tokenizer.json is truncated or was changed" in capsys.readouterr().err
    (home / "runs/m/SHA256SUMS").unlink()
    assert cli.main(["generate", "runs/m", "--max-tokens", "2"]) == 0


def test_lost_records_are_said(home, capsys):
    path = home / "runs/m/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    assert resume("--max-steps", 5) == 0
    assert "metrics.jsonl: 2 of " in capsys.readouterr().err


@pytest.mark.parametrize("place", ["as it was", "copied", "linked"])
@pytest.mark.parametrize("harm", ["config", "empty", "loop"])
def test_a_newest_checkpoint_without_settings_is_named_with_the_one_before(home, capsys, place, harm):
    bad = home / "runs/m/checkpoints/step-00000004"
    if harm == "config":
        (bad / "config.json").unlink()
    else:
        shutil.rmtree(bad)
        bad.mkdir() if harm == "empty" else bad.symlink_to(bad.name)
    if place == "copied":
        shutil.copytree(home / "runs/m", home / "runs/copy", symlinks=True)
    elif place == "linked":
        (home / "runs/copy").symlink_to("m")
    run = "runs/m" if place == "as it was" else "runs/copy"
    assert cli.main(["train", "--resume", run, "--max-steps", "5"]) == 2
    missing = "config.json" if harm == "config" else "SHA256SUMS"
    good = home / run / "checkpoints/step-00000002"
    assert f"{missing} is missing; the newest good one before it is {good}" in capsys.readouterr().err


def test_damaged_checksums_of_the_tokenizer_are_refused(home, capsys):
    sums = home / "runs/m/SHA256SUMS"
    sums.write_text("junk\n")
    for command in (["generate", "runs/m", "--max-tokens", "2"], ["train", "--resume", "runs/m", "--max-steps", "5"]):
        assert cli.main(command) == 2
        assert "runs/m: SHA256SUMS: damaged, line 1; restore it from a copy of the run" in capsys.readouterr().err
    assert sums.read_text() == "junk\n"
