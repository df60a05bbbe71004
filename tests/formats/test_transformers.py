"""Converted folders open with plain transformers calls, with equal results."""

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

from hgrn2.formats.convert import convert
from hgrn2.formats.opening import open_folder
from hgrn2.hf import HGRN2ForCausalLM
from hgrn2.models import HGRN2LM
from tests.formats.published import FLA_CONFIG, HYBRID, OFFICIAL_CONFIG, draw, fla_shapes, official_shapes, write

SOURCES = {
    "fla": (FLA_CONFIG | {"use_short_conv": True}, fla_shapes(convolutions=True)),
    "hybrid": (FLA_CONFIG | {"attn": HYBRID}, fla_shapes(hybrid=True)),
    "tied": (FLA_CONFIG | {"tie_word_embeddings": True}, fla_shapes(tied=True)),
    "official": (OFFICIAL_CONFIG, official_shapes()),
}


@pytest.mark.parametrize("to", ["hf", "native"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_same_logits(source, to, tmp_path):
    config, shapes = SOURCES[source]
    opened = open_folder(write(tmp_path / "source", config, draw(shapes)))
    model = HGRN2LM(opened.config).eval()
    opened.load_into(model)
    convert(opened, tmp_path / "out", to, tokenizer_dir=tmp_path / "source", max_shard_bytes=20_000)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(theirs, HGRN2ForCausalLM)
    assert not any(report.values())
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(theirs.eval()(ids).logits, model(ids)[0])
    # and what transformers saves is told and read again
    theirs.save_pretrained(tmp_path / "saved")
    again = open_folder(tmp_path / "saved")
    assert (again.layout.name, again.config) == ("hf", opened.config)
    assert all(torch.equal(again.read(name), opened.read(name)) for name in opened.places)
