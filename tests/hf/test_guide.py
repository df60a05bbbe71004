"""The guide's Python runs as it stands there, one block after the other."""

from pathlib import Path

import pytest

from hgrn2.cli import main
from hgrn2.inference.writing import Sampling, Writer
from hgrn2.loading import load
from tests.guides import ROOT, make_run, run_blocks

GUIDE = ROOT / "docs" / "guide" / "huggingface.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory. argument is set as true but no accelerator:UserWarning")
def test_the_guide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/notes"))
    assert main(["convert", "runs/notes", "notes-model", "--to", "hf"]) == 0
    names = run_blocks(GUIDE)
    assert "Once" in capsys.readouterr().out
    # what the blocks leave is what the text says
    assert (names["second"][:, : names["first"].sequences.shape[1]] == names["first"].sequences).all()
    assert type(names["whole"]).__name__ == "HGRN2ForCausalLM"
    assert 0 < names["loss"] < 10
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    own, own_tokenizer = load(tmp_path / "tuned", "latest", "cpu")
    writer = Writer(own, own_tokenizer, Sampling(temperature=0))
    assert "".join(writer.write("Once", 5))
    for folder in ("tuned", "merged"):
        assert main(["generate", folder, "--max-tokens", "3"]) == 0
