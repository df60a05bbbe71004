"""No model opens with a part of it random, unless that part is a head that another class had no use for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from hgrn2.formats.convert import convert
from hgrn2.formats.opening import open_folder
from hgrn2.hf import HGRN2ForCausalLM, HGRN2ForSequenceClassification
from tests.formats.published import FLA_CONFIG, draw, fla_shapes, merged, write
from tests.hf.cases import both, hf_config, tokens
from tests.refusals import refuses

AUTO = {"base": AutoModel, "language": AutoModelForCausalLM, "classifier": AutoModelForSequenceClassification}
LOST = "model.layers.1.attn.q_proj.weight"


def without(folder, *names):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if name not in names}
    assert len(kept) == len(tensors) - len(names)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return kept


@pytest.fixture
def saved(tmp_path):
    """A model saved with each head, and without one."""
    _, language = both("fla", torch.float32)
    language.save_pretrained(tmp_path / "language")
    language.model.save_pretrained(tmp_path / "base")
    HGRN2ForSequenceClassification(hf_config("fla")).save_pretrained(tmp_path / "classifier")
    return tmp_path


@pytest.mark.parametrize("opened", AUTO)
@pytest.mark.parametrize("written", AUTO)
def test_a_tensor_below_the_head_is_never_drawn(saved, written, opened):
    without(saved / written, LOST.removeprefix("model.") if written == "base" else LOST)
    with refuses("mismatch", "1 missing", "layers.1.attn.q_proj.weight"):
        AUTO[opened].from_pretrained(saved / written)


@pytest.mark.parametrize("opened", AUTO)
@pytest.mark.parametrize("written", AUTO)
def test_a_head_is_new_where_another_class_wrote_the_file(saved, written, opened):
    # not refused, and drawn
    for x in AUTO[opened].from_pretrained(saved / written).parameters():
        assert x.isfinite().all()
    _, info = AUTO[opened].from_pretrained(saved / written, output_loading_info=True)
    head = {"base": set(), "language": {"lm_head.weight"}, "classifier": {"score.weight"}}
    assert info["missing_keys"] == (set() if opened == written else head[opened])


@pytest.mark.parametrize(("kind", "head"), [("language", "lm_head.weight"), ("classifier", "score.weight")])
def test_a_head_is_not_new_where_its_own_class_wrote_the_file(saved, kind, head):
    without(saved / kind, head)
    with refuses("mismatch", f"1 missing: {head}"):
        AUTO[kind].from_pretrained(saved / kind)


def test_a_run_says_no_class_and_is_a_language_model(saved):
    folder = saved / "language"
    (folder / "config.json").write_text(json.dumps({"model": open_folder(folder).config.to_dict()}))
    without(folder, "lm_head.weight")
    with refuses("mismatch", "lm_head.weight"):
        HGRN2ForCausalLM.from_pretrained(folder)
    assert HGRN2ForSequenceClassification.from_pretrained(folder).score.weight.isfinite().all()


@pytest.mark.parametrize("named", [["foo"], [3], [], ["Hgrn2ForCausalLM"]])
def test_a_class_that_nobody_knows_is_no_reason_for_a_new_head(saved, named):
    folder = saved / "language"
    without(folder, "lm_head.weight")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": named}))
    with refuses("mismatch", "lm_head.weight"):
        HGRN2ForCausalLM.from_pretrained(folder)


def test_an_index_that_omits_tensors(tmp_path):
    _, model = both("fla", torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    shard = index["weight_map"][LOST]
    gone = {name for name, place in index["weight_map"].items() if place == shard}
    index["weight_map"] = {name: place for name, place in index["weight_map"].items() if place != shard}
    file.write_text(json.dumps(index))
    with refuses("mismatch", f"{len(gone)} missing", LOST):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_whoever_asks_for_the_report_gets_the_model(saved):
    folder = saved / "language"
    kept = without(folder, LOST)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == {LOST}
    assert all(torch.equal(x, kept[name]) for name, x in model.named_parameters() if name != LOST)


def test_tensors_given_by_hand_may_be_few(saved):
    kept, config = without(saved / "language", LOST), AutoConfig.from_pretrained(saved / "language")
    model = HGRN2ForCausalLM.from_pretrained(None, config=config, state_dict=kept)
    assert all(torch.equal(x, kept[name]) for name, x in model.named_parameters() if name != LOST)
    kept["lm_head.weight"] = kept["lm_head.weight"][:3]
    with refuses("mismatch", "state_dict", "lm_head.weight", "ignore_mismatched_sizes=True"):
        HGRN2ForCausalLM.from_pretrained(None, config=config, state_dict=kept)


@torch.no_grad()
def test_merged_files_of_fla(tmp_path):
    source = write(tmp_path / "old", FLA_CONFIG, merged(draw(fla_shapes())))
    misshapen = ("3 misshapen", "gate_proj.weight [48, 16]", "[24, 16]", "hgrn2 convert")
    for keys, names in (({}, misshapen), ({"ignore_mismatched_sizes": True}, ())):
        with refuses("mismatch", "3 missing", "up_proj", *names):
            AutoModelForCausalLM.from_pretrained(source, **keys)
    # what the message says to do
    opened = open_folder(source)
    convert(opened, tmp_path / "new", "hf", tokenizer_dir=source)
    ids = tokens(1, 5)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()(ids).logits
    torch.testing.assert_close(found, opened.load(torch.device("cpu"))(ids)[0])


def test_who_wrote_a_file_is_said_by_the_file(saved):
    plain = AutoConfig.from_pretrained(saved / "classifier")
    # with a configuration given, the head of another class is new all the same
    model = HGRN2ForSequenceClassification.from_pretrained(saved / "language", config=plain)
    assert model.score.weight.isfinite().all()
    # and that of its own is not
    without(saved / "language", "lm_head.weight")
    with refuses("mismatch", "lm_head.weight"):
        HGRN2ForCausalLM.from_pretrained(saved / "language", config=plain)


def test_a_class_of_the_users_is_no_other_class(saved):
    class Mine(HGRN2ForCausalLM):
        pass

    assert Mine.from_pretrained(saved / "language").lm_head.weight.isfinite().all()
    without(saved / "language", "lm_head.weight")
    with refuses("mismatch", "lm_head.weight"):
        Mine.from_pretrained(saved / "language")


def test_an_ordinary_tensor_of_another_shape(saved):
    folder = saved / "language"
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with refuses("mismatch", "1 misshapen", "gate_proj"):
        HGRN2ForCausalLM.from_pretrained(folder)
