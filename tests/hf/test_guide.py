"""The guide's Python runs as it stands there, one block after the other."""

import re
from pathlib import Path

import pytest
from transformers.modeling_outputs import CausalLMOutputWithPast

from hgrn2.cli import main
from hgrn2.data import train_bpe
from hgrn2.generate import Sampling, Writer
from hgrn2.models import HGRN2LM, presets
from hgrn2.settings import load_model
from hgrn2.train.checkpoint import CheckpointStore, create_run, model_tensors

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "huggingface.md"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory. argument is set as true but no accelerator:UserWarning")
def test_the_guide(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = train_bpe(["Once upon a time it rained, and then it stopped again"], 270)
    config = presets.variant(
        "fla",
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        expand_ratio=8,
        intermediate_size=24,
    )
    run = tmp_path / "runs" / "notes"
    settings = {"model": config.to_dict(), "train": {}, "data": {}}
    create_run(run, settings, tokenizer)
    CheckpointStore(run, 1).save(
        model=model_tensors(HGRN2LM(config)), optimizer={}, task={}, state={"step": 1}, config=settings, best_step=None
    )
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    assert main(["convert", "runs/notes", "notes-model", "--to", "hf"]) == 0
    for block in blocks:
        if "cache" not in CausalLMOutputWithPast.__dataclass_fields__:
            block = block.replace("cache=first.cache", "past_key_values=first.past_key_values")
        exec(compile(block, str(GUIDE), "exec"), names)
    assert "Once" in capsys.readouterr().out
    # what the blocks leave is what the text says
    assert (names["second"][:, : names["first"].sequences.shape[1]] == names["first"].sequences).all()
    assert type(names["whole"]).__name__ == "HGRN2ForCausalLM"
    assert 0 < names["loss"] < 10
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    own, own_tokenizer = load_model(tmp_path / "tuned", "latest", "cpu")
    writer = Writer(own, own_tokenizer, Sampling(temperature=0))
    assert "".join(writer.write("Once", 5))
    for folder in ("tuned", "merged"):
        assert main(["generate", folder, "--max-tokens", "3"]) == 0
