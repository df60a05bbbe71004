"""The card in a folder for transformers says what the model is, and opens it."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from hgrn2 import HGRN2Config, cli
from hgrn2.formats.card import _license_of, write_card
from tests.formats.command_line import run_cli
from tests.formats.published import FLA_CONFIG, HYBRID, draw, fla_shapes, write
from tests.guides import make_run, python_blocks


def run_text(code):
    names = {}
    exec(compile(code, "card", "exec"), names)
    return names


def test_a_run_s_card(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/notes"), data={"data": ["/home/somebody/private/notes", "hf:roneneldan/TinyStories"]})
    told = run_cli(capsys, "convert", "runs/notes", "my model's", "--to", "hf")
    # what is printed opens the folder, and so does what the card shows
    model = run_text("\n".join(line.strip() for line in told.splitlines()[2:]))["model"]
    card = Path("my model's", "README.md")
    (block,) = python_blocks(card)
    names = run_text(block)
    assert type(names["model"]) is type(model)
    assert names["tokenizer"]("Once").input_ids
    text = card.read_text()
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} (float32) |" in text
    assert "| layers | 2: all recurrent |" in text
    assert "| training data | notes, hf:roneneldan/TinyStories |" in text
    assert "somebody" not in text
    assert "| licence | not known to the program" in text
    assert not re.search("^license:", text, re.MULTILINE)
    (command,) = re.findall("^    hgrn2 (.*)$", text, re.MULTILINE)
    assert command == 'generate "my model\'s" --prompt Once'
    assert cli.main(["generate", "my model's", "--prompt", "Once", "--max-tokens", "2"]) == 0


def test_a_published_model_keeps_its_licence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "fla", FLA_CONFIG | {"attn": HYBRID}, draw(fla_shapes(hybrid=True)))
    Path("fla/README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# theirs\n")
    run_cli(capsys, "convert", "fla", "out", "--to", "hf", "--dtype", "bfloat16")
    text = Path("out/README.md").read_text()
    assert "\nlicense: apache-2.0\n---\n" in text
    assert "| licence | apache-2.0 |" in text
    assert "(bfloat16)" in text
    assert re.search(r"of them attend, the others are recurrent", text)
    assert "    hgrn2 info out" in text
    run_text(python_blocks(Path("out/README.md"))[0])
    # and so on from folder to folder; other layouts have no card
    run_cli(capsys, "convert", "out", "again", "--to", "hf")
    assert "license: apache-2.0" in Path("again/README.md").read_text()
    assert "opens in Python" not in run_cli(capsys, "convert", "out", "native", "--to", "native")
    assert not Path("native/README.md").exists()


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\r\nlicense: 'cc-by-4.0'\r\n---\r\n", "cc-by-4.0"),
        ("# a card\nlicense: mit\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\nlicense: mit\n# it has no end\n", None),
        (b"\xff\xfe", None),
        (None, None),
    ],
)
def test_the_licence_of_a_card(card, license, tmp_path):
    path = tmp_path / "README.md"
    if card is not None:
        path.write_bytes(card if isinstance(card, bytes) else card.encode())
    assert _license_of(path) == license


def test_a_card_gives_the_size_of_the_state(tmp_path):
    def line(**changes):
        config = HGRN2Config(vocab_size=8, hidden_size=16, num_hidden_layers=2, expand_ratio=8, **changes)
        card = write_card("m", config, source=tmp_path, settings={}, has_tokenizer=False, dtype="float32")
        return next(row for row in card.splitlines() if "state of a sequence" in row)

    assert "1,024 bytes, whatever its length" in line()
    mixers = {"attention": {"num_heads": 2, "window_size": 4}}
    assert "520 bytes, and 129 a token for the attention cache (up to 3 tokens)" in line(
        layers=["hgrn2", "attention"], mixers=mixers
    )
