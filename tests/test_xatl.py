"""The experiment on a start from a Transformer, and the scripts that bring real ones, at sizes that take no time."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from hgrn2.data import train_bpe
from hgrn2.nn.rotary import rotate_halves
from hgrn2.train import plots
from hgrn2.train.metrics import read_metrics
from tests.formats.llama import LLAMA, TENSORS
from tests.formats.published import write

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
NAMES = ("report", "pretrained", "xatl")


@pytest.fixture
def modules(monkeypatch):
    """The scripts as modules by name, forgotten afterwards: their names are nobody's own."""
    monkeypatch.syspath_prepend(FOLDER)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def test_tokens_to_reach(modules):
    curve = [(0, 5.0), (10, 4.0), (20, 3.0), (30, 3.5)]
    reach = modules["xatl"].tokens_to_reach
    assert [reach(curve, loss) for loss in (5.5, 4.0, 3.9, 3.0, 2.9)] == [0, 10, 20, 20, None]


def test_rows(modules):
    xatl = modules["xatl"]
    scratch = [(0, 9.0), (100, 4.0), (200, 3.0)]
    rows = xatl.rows_of("linear", {xatl.SCRATCH: scratch, xatl.START: [(0, 6.0), (100, 2.9), (200, 2.5)]})
    assert [row.value for row in rows] == [3.0, 2.5, 6.0, 100]
    assert rows[-1].note == "50% of the 200 of the run from scratch"
    (*_, last) = xatl.rows_of("linear", {xatl.SCRATCH: scratch, xatl.START: [(0, 6.0), (200, 3.1)]})
    assert (last.value, last.note) == (None, "not reached")


def make_text_and_model(folder):
    text = folder / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"text {i}: " + " ".join(f"word{i * k % 11}" for k in range(20)))
    llama = write(folder / "llama", LLAMA, TENSORS)
    train_bpe([file.read_text() for file in text.iterdir()], 260).save(llama)
    return text, llama


@pytest.mark.slow
def test_from_end_to_end(modules, tmp_path, monkeypatch, capsys):
    text, llama = make_text_and_model(tmp_path)
    held_out = tmp_path / "held-out.txt"
    held_out.write_text(" ".join(f"word{i % 7}" for i in range(100)))
    work, out, picture = (tmp_path / name for name in ("work", "out.json", "curves.png"))
    words = [
        "xatl", llama, "--data", text, "--validation", held_out, "--work", work,
        "--max-tokens", 288, "--batch-size", 2, "--seq-len", 24,
        "--validations", 3, "--validation-tokens", 100, "--threads", 1, "--unfreeze-every", 1,
        "--unfreeze-threshold", 100, "--distill", "none", "every:4", "--scratch-learning-rate", 0.002,
        "--out", out, "--picture", picture,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    # six runs' own pictures would take most of the time
    monkeypatch.setattr(plots, "plot_run", lambda run: [])
    assert modules["xatl"].main() == 0
    record = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record
    assert picture.stat().st_size > 10_000
    # four characters a token
    pieces = [json.loads(line)["text"] for line in (work / "prepared-held-out.jsonl").read_text().splitlines()]
    assert "".join(pieces) == held_out.read_text()
    assert {len(piece) for piece in pieces[:-1]} == {4 * 24}
    ways = {"from scratch", "from the Transformer", "from the Transformer, which teaches"}
    assert record["curves"].keys() == {"all linear", "1 of 4 layers attend"}
    rows = {row["name"]: row["value"] for row in record["rows"]}
    assert rows["the Transformer itself: validation loss"] > 1
    for kind, curves in record["curves"].items():
        assert curves.keys() == ways
        for way, curve in curves.items():
            assert [tokens for tokens, _ in curve] == [0, 96, 192, 288]
            assert rows[f"{kind}, {way}: validation loss"] == pytest.approx(curve[-1][1], rel=1e-3)
    for kept in ("none", "every-4"):
        configs = [json.loads((work / f"{kept}-{i}" / "config.json").read_text()) for i in range(3)]
        assert configs[0]["model"] == configs[1]["model"] == configs[2]["model"]
        assert [c["train"]["freeze"] for c in configs] == ["", "copied", "copied"]
        assert [c["train"]["learning_rate"] for c in configs] == [0.002, 0.001, 0.001]
        assert [r["step"] for r in read_metrics(work / f"{kept}-1") if r["kind"] == "unfreeze"] == [2]
        # the same batches: what decides about them is the same
        data = [{key: value for key, value in c["data"].items() if key != "run_was_at"} for c in configs]
        assert data[0] == data[1] == data[2]
        assert len({tuple(c["train"][key] for key in ("seed", "batch_size", "seq_len")) for c in configs}) == 1


def test_what_is_finished_is_not_repeated(modules, tmp_path, monkeypatch, capsys):
    text, llama = make_text_and_model(tmp_path)
    work, out = tmp_path / "work", tmp_path / "out.json"
    words = ["xatl", llama, "--data", text, "--work", work, "--max-tokens", 100, "--batch-size", 2, "--seq-len", 24]
    words += ["--validations", 1, "--threads", 1, "--kinds", "none", "--out", out]
    monkeypatch.setattr(plots, "plot_run", lambda run: [])
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    assert modules["xatl"].main() == 0
    first = json.loads(out.read_text())["curves"]
    monkeypatch.setattr(modules["xatl"], "start_language_run", None)
    assert modules["xatl"].main() == 0
    assert json.loads(out.read_text())["curves"] == first
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seq-len", "12"])
    with pytest.raises(SystemExit):
        modules["xatl"].main()
    assert "none-0: a run with other settings (seq_len, validation_every); remove it" in capsys.readouterr().err
    metrics = work / "none-1" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if '"validation"' not in line))
    monkeypatch.setattr(sys, "argv", sys.argv[:-2])
    with pytest.raises(SystemExit):
        modules["xatl"].main()
    assert "none-1: ends after 0 of 100 tokens; remove it" in capsys.readouterr().err
    # the text has changed, and was prepared again
    (text / "0.txt").write_text("another text")
    with pytest.raises(SystemExit):
        modules["xatl"].main()
    assert "none-0: older than the tokens in " in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--distill", "evry:4"])
    with pytest.raises(SystemExit):
        modules["xatl"].main()
    assert "--distill evry:4: not among --kinds none" in capsys.readouterr().err


def test_a_checkpoint_of_llama2c(modules):
    header = (8, 12, 2, 2, 1, 20, 16)
    count = 20 * 8 + 2 * (8 + 8 * 8 + 2 * 4 * 8 + 8 * 8 + 8 + 3 * 12 * 8) + 8 + 2 * 16 * 2
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    found, tensors, end = modules["pretrained"].read_llama2c(struct.pack("<7i", *header) + values.numpy().tobytes())
    assert (found["n_kv_heads"], found["seq_len"], end) == (1, 16, 28 + 4 * count)
    assert torch.equal(tensors["model.embed_tokens.weight"].flatten(), values[:160])
    # behind the embeddings and the norms lie q of both layers; heads are 4 wide, neighbours rotate together
    raw = values[160 + 16 : 160 + 16 + 2 * 64].view(2, 8, 8)
    halves = partial(rotate_halves, theta=10000.0)
    x, places = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1)), torch.arange(5).unsqueeze(0)
    scores = []
    for weight, rotate in ((raw[1], neighbours), (tensors["model.layers.1.self_attn.q_proj.weight"], halves)):
        heads = rotate((x @ weight.T).unflatten(-1, (2, 4)), places)
        scores.append(torch.einsum("bthk,bshk->bhts", heads, heads))
    torch.testing.assert_close(scores[0], scores[1])
    assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (4, 8)


def neighbours(x, places):
    """Rotary positions as llama2.c has them: numbers 2 i and 2 i + 1 of a head are a pair."""
    angle = places[..., None, None] * 10000.0 ** (-torch.arange(0, 4, 2) / 4)
    turned = torch.view_as_complex(x.unflatten(-1, (2, 2)).contiguous()) * torch.polar(
        torch.ones(()).expand_as(angle), angle
    )
    return torch.view_as_real(turned).flatten(-2)


def test_a_vocabulary_of_llama2c(modules):
    pretrained = modules["pretrained"]
    texts = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(bytes([i]) for i in range(256)), b" ", b"a", b"b", b"ab", b" ab"]
    scores = [0.0] * 259 + [-10.0, -11.0, -12.0, -1.0, -2.0]
    packed = b"".join(struct.pack("<fi", s, len(t)) + t for t, s in zip(texts, scores, strict=True))
    pieces = pretrained.read_pieces(struct.pack("<i", 6) + packed, len(texts))
    assert [piece for piece, _ in pieces[:5]] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x01>"]
    assert [piece for piece, _ in pieces[259:]] == ["▁", "a", "b", "ab", "▁ab"]
    tokenizer = pretrained.make_tokenizer(pieces)
    # what is no piece is written in bytes
    assert tokenizer.encode("ab ba!", add_special_tokens=False).ids == [263, 259, 261, 260, 3 + ord("!")]
    assert tokenizer.decode([263, 259, 261, 260, 3 + ord("!")]) == "ab ba!"
