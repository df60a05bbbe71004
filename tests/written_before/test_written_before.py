"""Folders written by commit 33b8316 (see write.py) open, resume, continue and convert, with the same numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from hgrn2 import HGRN2LM, cli

HERE = Path(__file__).parent
FIGURES = json.loads((HERE / "figures.json").read_text())
# other processors round the last bits differently
RTOL = 1e-6


def command(*words):
    assert cli.main([str(word) for word in words]) == 0, words


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A copy of the folder, as the working folder, in another place than where it was written."""
    place = shutil.copytree(HERE, tmp_path / "written")
    monkeypatch.chdir(place)
    return place


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def assert_same_logits(folder, name):
    model = HGRN2LM.load(folder, device="cpu")
    with torch.no_grad():
        logits, _ = model(torch.tensor([FIGURES["ids"]]))
    torch.testing.assert_close(logits[0, -1, :8], torch.tensor(FIGURES["logits"][name]), rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize("name", ["run", "hf", "fla", "native", "official"])
def test_opens_with_the_same_logits(name):
    assert_same_logits(HERE / name, name)


@pytest.mark.parametrize("name", ["run", "hf", "fla", "native", "official"])
def test_converts(name, written):
    command("convert", name, "converted", "--to", "hf")
    assert_same_logits(written / "converted", name)


def test_a_stopped_run_resumes_with_the_same_losses(written):
    assert len(FIGURES["losses"]) == 30
    command("train", "--resume", "run")
    found = losses(written / "run")
    assert found == pytest.approx(FIGURES["losses"], rel=RTOL)
    # the first half was read, the second computed
    assert found[:15] == FIGURES["losses"][:15]


def test_prepares_and_trains_again_with_the_same_tokens_and_losses(written):
    command(
        "train", "--out", "again", "--data", "text", "--tokenizer", "bytes", "--prepared", "prepared-again",
        "--max-steps", "30", "--batch-size", "2", "--seq-len", "32", "--validation-every", "0",
        "--validation-tokens", "300", "--device", "cpu", "--num-threads", "1", "--seed", "5", "--learning-rate", "3e-3",
        "--set", "hidden_size=16", "num_hidden_layers=2", "expand_ratio=8", "intermediate_size=24",
        "initializer_range=0.1", "use_short_conv=true",
        'attn={"layers":[1],"num_heads":2,"num_kv_heads":1,"window_size":20}',
    )  # fmt: skip
    files = sorted(file.relative_to("prepared") for file in Path("prepared").rglob("*.bin"))
    assert len(files) == 6
    for file in files:
        assert ("prepared-again" / file).read_bytes() == ("prepared" / file).read_bytes(), file
    assert losses(written / "again") == pytest.approx(FIGURES["losses"], rel=RTOL)


def test_a_state_continues(written, capsys):
    command(
        "generate", "run", "--prompt", "bytes", "--max-tokens", "12", "--temperature", "0", "--device", "cpu",
        "--state-in", "state.safetensors",
    )  # fmt: skip
    assert capsys.readouterr().out == FIGURES["continued"]
