"""Files: written and read back, in pieces, in another dtype, on devices, with parts missing."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hgrn2.hf import HGRN2Config, HGRN2ForCausalLM, HGRN2Model
from hgrn2.models import presets
from hgrn2.models.cost import cost
from tests.hf.cases import KINDS, both, continued, hf_config, tokens


@pytest.mark.parametrize("name", [*KINDS, "tied", "mixer-layernorm", "block-layernorm-plain", "no-bound"])
@torch.no_grad()
def test_a_model_survives_a_folder(name, tmp_path):
    own, model = both(name, torch.float32)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is HGRN2ForCausalLM
    assert not again.training
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokens(2, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    # the file holds our names; the tied matrix once
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == own.state_dict().keys() - ({"lm_head.weight"} if name == "tied" else set())
    assert (again.lm_head.weight is again.model.embeddings.weight) == (name == "tied")


@pytest.mark.parametrize("name", ["short-conv", "tied"])
@torch.no_grad()
def test_in_several_files(name, tmp_path):
    _, model = both(name, torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    ids = tokens(2, 9)
    for keys in ({}, {"device_map": "cpu"}, {"device_map": "auto"}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **keys)
        assert torch.equal(again(ids).logits, model(ids).logits)


# a parameter outside of the layers must be placed, and is then warned of
@pytest.mark.filterwarnings("ignore:.*do not match any submodules.*lower_bounds:UserWarning")
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_weights_that_lie_on_the_disk(name, tmp_path):
    own, model = both(name, torch.float32)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embeddings": "cpu", "model.lower_bounds": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert again.lm_head.weight.is_meta
    ids = tokens(2, 9)
    out = again(ids, labels=ids)
    wanted = model(ids, labels=ids)
    assert torch.equal(out.logits, wanted.logits)
    torch.testing.assert_close(out.loss, wanted.loss)
    assert torch.equal(again.generate(ids, max_new_tokens=4, do_sample=False), continued(own, ids, 4))


@torch.no_grad()
def test_dtypes_of_files(tmp_path):
    _, model = both("fla", torch.float32)
    model.save_pretrained(tmp_path / "float32")
    low = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    low.save_pretrained(tmp_path / "bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16")
    ids = tokens(2, 9)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(ids).logits, low(ids).logits)
    high = AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16", dtype="float32")
    assert high.dtype == torch.float32


@torch.no_grad()
def test_heads_come_and_go(tmp_path):
    _, model = both("window-attention", torch.float32)
    model.save_pretrained(tmp_path / "language")
    ids = tokens(2, 9)
    base, info = AutoModel.from_pretrained(tmp_path / "language", output_loading_info=True)
    assert type(base) is HGRN2Model
    assert not info["missing_keys"]
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "language", num_labels=5, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    assert classifier.score.weight.std() == pytest.approx(0.02, rel=0.4)
    assert torch.equal(classifier.model(ids).last_hidden_state, base(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert "layers.0.attn.q_proj.weight" in load_file(tmp_path / "base" / "model.safetensors")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert torch.equal(again.model(ids).last_hidden_state, base(ids).last_hidden_state)


def test_missing_tensors_are_drawn_as_at_a_start(tmp_path):
    _, model = both("mixer-layernorm", torch.float32)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = [
        "model.lower_bounds", "model.norm.weight", "model.layers.1.attn.g_norm.bias",
        "model.layers.2.attn.o_proj.weight", "model.layers.0.attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight",
    ]  # fmt: skip
    kept = {name: x for name, x in tensors.items() if name not in gone}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    again, info = HGRN2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == set(gone)
    found = again.state_dict()
    assert all(torch.equal(found[name], x) for name, x in kept.items())
    assert not found["model.lower_bounds"].any()
    assert (found["model.norm.weight"] == 1).all()
    assert not found["model.layers.1.attn.g_norm.bias"].any()
    assert found["model.layers.0.attn.q_proj.weight"].std() == pytest.approx(0.02, rel=0.2)
    for name in ("model.layers.2.attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        assert found[name].std() == pytest.approx(0.02 / 6**0.5, rel=0.2)


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    _, model = both("fla", torch.float32)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        HGRN2ForCausalLM.from_pretrained(tmp_path / "model", vocab_size=31)
    shutil.copytree(tmp_path / "model", tmp_path / "short")
    data = (tmp_path / "short" / "model.safetensors").read_bytes()
    (tmp_path / "short" / "model.safetensors").write_bytes(data[:-10])
    with pytest.raises(Exception, match=r"incomplete metadata|InvalidHeader|not fully covered"):
        HGRN2ForCausalLM.from_pretrained(tmp_path / "short")


def test_a_large_model_takes_no_memory_on_the_meta_device():
    own = presets.preset("1.3b")
    with torch.device("meta"):
        model = HGRN2ForCausalLM(HGRN2Config(**own.to_dict()))
    assert all(x.is_meta for x in model.state_dict().values())
    assert len(model.state_dict()) == 244
    assert model.num_parameters() == cost(own).parameters == 1_364_396_032


@pytest.mark.parametrize("name", ["fla", "tied"])
@pytest.mark.parametrize("size", [40, 20])
@torch.no_grad()
def test_another_vocabulary(name, size, tmp_path):
    _, model = both(name, torch.float32)
    ids = tokens(2, 9).clamp_max(19)
    wanted = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (size, 16)
    assert (model.lm_head.weight is model.model.embeddings.weight) == (name == "tied")
    common = min(size, 29)
    torch.testing.assert_close(model(ids).logits[..., :common], wanted[..., :common])
    assert model(ids, labels=ids).loss.isfinite()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_config_alone_makes_a_model():
    model = AutoModelForCausalLM.from_config(hf_config("tied"), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embeddings.weight


@torch.no_grad()
def test_tensors_of_another_shape_are_drawn_anew_if_asked(tmp_path):
    _, model = both("fla", torch.float32)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, vocab_size=31, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key[0] for key in info["mismatched_keys"]} == {"model.embeddings.weight", "lm_head.weight"}
    assert again.lm_head.weight.shape == (31, 16)
    assert again.lm_head.weight.std() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(again.model.layers[1].attn.f_proj.weight, model.model.layers[1].attn.f_proj.weight)


def test_copies_are_independent(tmp_path):
    _, model = both("tied")
    again = copy.deepcopy(model)
    assert again.lm_head.weight is again.model.embeddings.weight
    with torch.no_grad():
        again.lm_head.weight.zero_()
    assert model.lm_head.weight.any()
