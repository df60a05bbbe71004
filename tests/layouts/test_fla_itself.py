"""fla as installed, where it is: what it saves is what our data says, and it opens what we write."""

import warnings

import pytest
import torch

pytest.importorskip("transformers")
with warnings.catch_warnings():
    # it says on import that it has no GPU
    warnings.simplefilter("ignore")
    pytest.importorskip("fla")
    from fla.layers import attn  # pyright: ignore[reportMissingImports]
    from fla.models.hgrn2 import HGRN2Config, HGRN2ForCausalLM  # pyright: ignore[reportMissingImports]

from hgrn2.layouts.convert import convert
from hgrn2.layouts.opening import open_folder
from tests.layouts.published import FF, HYBRID, VOCAB, D, L, draw, fla_shapes, tensors_of

KINDS = {
    "plain": ({}, {}),
    "short convolutions": ({"use_short_conv": True}, {"convolutions": True}),
    "tied": ({"tie_word_embeddings": True}, {"tied": True}),
    "no lower bound": ({"use_lower_bound": False}, {"lower_bound": False}),
    "hybrid": ({"attn": HYBRID}, {"hybrid": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_settings_and_both_ways(kind, tmp_path, monkeypatch):
    # its attention is only made here, not run
    monkeypatch.setattr(attn, "flash_attn_func", attn.flash_attn_func or object())
    keys, shapes = KINDS[kind]
    config = HGRN2Config(
        hidden_size=D,
        num_hidden_layers=L,
        expand_ratio=4,
        vocab_size=VOCAB,
        intermediate_size=FF,
        norm_eps=0.01,
        **keys,
    )
    theirs = HGRN2ForCausalLM(config)
    wanted = fla_shapes(**shapes)
    drawn = draw(wanted)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(drawn[name])
    theirs.save_pretrained(tmp_path / "theirs")
    assert {name: tuple(x.shape) for name, x in tensors_of(tmp_path / "theirs").items()} == wanted
    opened = open_folder(tmp_path / "theirs")
    assert opened.layout.name == "fla"
    assert all(torch.equal(opened.read(name), x) for name, x in drawn.items())
    convert(opened, tmp_path / "ours", "fla", tokenizer_dir=tmp_path / "theirs", max_shard_bytes=20_000)
    again, report = HGRN2ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert {name: x.equal(drawn[name]) for name, x in again.named_parameters()} == dict.fromkeys(drawn, True)
    # every setting there and back; where it came from differs
    before, after = config.to_dict(), again.config.to_dict()
    assert after | {"_name_or_path": ""} == before | {"_name_or_path": ""}
