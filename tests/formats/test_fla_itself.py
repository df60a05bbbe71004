"""fla as installed: what it saves is what our data says, it opens what we write, and both may be in one process."""

import importlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM

import hgrn2.hf
from hgrn2.formats.convert import convert
from hgrn2.formats.opening import open_folder
from tests.formats.installed_fla import import_fla
from tests.formats.published import FF, FLA_CONFIG, HYBRID, VOCAB, D, L, draw, fla_shapes, tensors_of, write

KINDS = {
    "plain": ({}, {}),
    "short convolutions": ({"use_short_conv": True}, {"convolutions": True}),
    "tied": ({"tie_word_embeddings": True}, {"tied": True}),
    "no lower bound": ({"use_lower_bound": False}, {"lower_bound": False}),
    "hybrid": ({"attn": HYBRID}, {"hybrid": True}),
}


@pytest.fixture(scope="module")
def fla():
    return import_fla()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_settings_and_both_ways(kind, fla, tmp_path, monkeypatch):
    # its attention is only made here, not run
    monkeypatch.setattr(fla.attn, "flash_attn_func", fla.attn.flash_attn_func or object())
    keys, shapes = KINDS[kind]
    config = fla.Config(
        hidden_size=D,
        num_hidden_layers=L,
        expand_ratio=4,
        vocab_size=VOCAB,
        intermediate_size=FF,
        norm_eps=0.01,
        **keys,
    )
    theirs = fla.ForCausalLM(config)
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
    again, report = fla.ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert {name: x.equal(drawn[name]) for name, x in again.named_parameters()} == dict.fromkeys(drawn, True)
    # every setting there and back; where it came from differs
    before, after = config.to_dict(), again.config.to_dict()
    assert after | {"_name_or_path": ""} == before | {"_name_or_path": ""}


def test_imported_after_us_it_has_the_model_type_until_we_register_again(fla, tmp_path):
    folder = write(tmp_path / "theirs", FLA_CONFIG, draw(fla_shapes()))
    try:
        # the lines that its import runs
        importlib.reload(fla.model)
        assert type(AutoModelForCausalLM.from_pretrained(folder)) is fla.ForCausalLM
        # by their own names either opens the file
        assert type(hgrn2.hf.HGRN2ForCausalLM.from_pretrained(folder)) is hgrn2.hf.HGRN2ForCausalLM
        config = fla.Config.from_pretrained(folder)
        assert type(AutoModelForCausalLM.from_config(config)) is fla.ForCausalLM
    finally:
        hgrn2.hf.register()
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is hgrn2.hf.HGRN2ForCausalLM
    assert type(fla.ForCausalLM.from_pretrained(folder)) is fla.ForCausalLM
    assert type(AutoModelForCausalLM.from_config(config)) is fla.ForCausalLM


@pytest.mark.slow
def test_imported_before_us_it_leaves_us_the_model_type(fla, tmp_path):
    folder = write(tmp_path / "theirs", FLA_CONFIG, draw(fla_shapes()))
    code = textwrap.dedent("""
        import json
        import sys
        import fla.models.hgrn2
        import hgrn2.hf
        from transformers import AutoModelForCausalLM

        config = fla.models.hgrn2.HGRN2Config.from_pretrained(sys.argv[1])
        models = (
            AutoModelForCausalLM.from_pretrained(sys.argv[1]),
            fla.models.hgrn2.HGRN2ForCausalLM.from_pretrained(sys.argv[1]),
            AutoModelForCausalLM.from_config(config),
        )
        print(json.dumps([type(model).__module__.partition(".")[0] for model in models]))
    """)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(hgrn2.__file__)), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["hgrn2", "fla", "fla"]
