"""What folders may hold, and every way in which they may be wrong."""

import contextlib
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hgrn2.errors import UserError
from hgrn2.formats.opening import open_folder
from hgrn2.formats.reading import Weights, find_weights
from hgrn2.models import HGRN2LM
from tests.formats.published import (
    FLA_CONFIG,
    OFFICIAL_CONFIG,
    D,
    assert_same_bits,
    draw,
    fla_shapes,
    official_shapes,
    write,
    write_shards,
)

TENSORS = draw(fla_shapes())
INDEX = "model.safetensors.index.json"


def read_all(folder):
    opened = open_folder(folder)
    return {name: opened.read(name) for name in opened.places}


def refused(folder, message):
    with pytest.raises(UserError, match=message) as error:
        open_folder(folder)
    # one line, that begins with the place
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))


def pickled(folder, content, name="pytorch_model.bin", **how):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(FLA_CONFIG))
    torch.save(content, folder / name, **how)
    return folder


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def test_every_form_of_the_same_weights(tmp_path):
    parameters = {name: torch.nn.Parameter(x) for name, x in TENSORS.items()}
    folders = [
        write(tmp_path / "whole", FLA_CONFIG, TENSORS),
        write_shards(tmp_path / "shards", FLA_CONFIG, TENSORS, 3),
        pickled(tmp_path / "pickle", parameters),
        pickled(tmp_path / "old-pickle", TENSORS, _use_new_zipfile_serialization=False),
    ]
    shards = pickled(tmp_path / "pickles", dict(list(TENSORS.items())[:5]), "pytorch_model-00001-of-00002.bin")
    pickled(shards, dict(list(TENSORS.items())[5:]), "pytorch_model-00002-of-00002.bin")
    places = {name: f"pytorch_model-0000{1 + (i > 4)}-of-00002.bin" for i, name in enumerate(TENSORS)}
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    for folder in [*folders, shards]:
        assert_same_bits(read_all(folder), TENSORS)


def test_safetensors_are_read_where_both_forms_lie(tmp_path):
    folder = write(tmp_path / "both", FLA_CONFIG, TENSORS)
    (folder / "pytorch_model.bin").write_bytes(b"nothing")
    assert find_weights(folder) == folder / "model.safetensors"
    assert_same_bits(read_all(folder), TENSORS)


def test_rows_of_a_tensor_and_a_single_number(tmp_path):
    save_file({"a": torch.arange(12.0).view(4, 3), "b": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    pickled(tmp_path / "p", {"a": torch.arange(12.0).view(4, 3), "b": torch.tensor(2.0)})
    for folder in (tmp_path, tmp_path / "p"):
        weights = Weights(folder)
        assert weights.specs["a"].shape == (4, 3)
        assert weights.read("a", 1, 3).tolist() == [[3, 4, 5], [6, 7, 8]]
        assert weights.read("b").item() == 2


# which layout it is


def test_a_layout_is_told_by_keys(tmp_path):
    assert open_folder(write(tmp_path / "fla", FLA_CONFIG, TENSORS)).layout.name == "fla"
    official = write(tmp_path / "official", OFFICIAL_CONFIG, draw(official_shapes()))
    assert open_folder(official).layout.name == "official"
    own = open_folder(tmp_path / "fla").config.to_dict()
    assert open_folder(write(tmp_path / "hf", own, TENSORS)).layout.name == "hf"
    run = {"model": own, "train": {}, "data": {}}
    assert open_folder(write(tmp_path / "run", run, TENSORS)).layout.name == "native"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FLA_CONFIG | {"model_type": "gla"}, "model_type is 'gla'; wanted 'hgrn2'"),
        ({"model_type": "hgrn2", "hidden_size": 16}, "no key that tells which layout it is of"),
        (
            FLA_CONFIG | {"glu_act": "none"},
            "keys of more than one layout, attn_mode of fla and glu_act of hgru2-pytorch",
        ),
        (
            FLA_CONFIG | {"mixer_norm": "rmsnorm"},
            r"keys of more than one layout, mixer_norm of hgrn2\.hf and attn_mode",
        ),
        (FLA_CONFIG | {"model": {}}, "keys of more than one layout, model of a run and attn_mode of fla"),
        ({"model": {"hidden_size": 16}, "hidden_size": 16}, "hidden_size beside the table 'model'"),
        ({"model": {"hidden_size": 16}, "trian": {}}, "config of a run: unknown key 'trian'; did you mean 'train'"),
        ({"model": 3}, "found int; wanted a table of settings"),
        ({"mixer_norm": "rmsnorm", "hidden_sise": 16}, "unknown key 'hidden_sise'; did you mean 'hidden_size'"),
        (FLA_CONFIG | {"num_heads": 2}, "num_heads = 2 contradicts hidden_size / expand_ratio = 4"),
        ([1], "found list, wanted an object"),
        (FLA_CONFIG | {"num_hidden_layers": 4000}, "asks for 4000 layers; the files hold 34 tensors"),
    ],
)
def test_settings_that_are_ambiguous_or_of_another_model(config, message, tmp_path):
    refused(write(tmp_path / "folder", config, TENSORS), message)


def test_no_settings_or_no_json(tmp_path):
    folder = write(tmp_path / "folder", FLA_CONFIG, TENSORS)
    (folder / "config.json").write_text("{")
    refused(folder, "config.json: not JSON")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, "config.json: not JSON")
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "config.json: not JSON")
    (folder / "config.json").unlink()
    refused(folder, "no config.json there")
    (folder / "config.json").mkdir()
    refused(folder, "config.json: cannot be read")


# tensors that do not belong to the settings


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path):
    tensors = TENSORS | {
        "model.extra": torch.zeros(2),
        "model.norm.weight": torch.ones(7),
        "score.weight": torch.ones(2),
    }
    del tensors["lm_head.weight"], tensors["model.layers.2.attn.q_proj.weight"]
    refused(
        write(tmp_path / "folder", FLA_CONFIG, tensors),
        r"\(layout of fla\) asks for: 2 missing: model\.layers\.2\.attn\.q_proj\.weight, lm_head\.weight; "
        r"2 unexpected: model\.extra, score\.weight; 1 misshapen: model\.norm\.weight \[7\], wanted \[16\]",
    )


def test_a_name_of_two_lines_is_shown_in_one(tmp_path):
    tensors = TENSORS | {"first\nsecond": torch.zeros(2)}
    refused(write(tmp_path / "folder", FLA_CONFIG, tensors), r"1 unexpected: 'first\\nsecond'; take")


def test_a_long_list_is_cut_and_counted(tmp_path):
    folder = write(tmp_path / "official-tensors", FLA_CONFIG, draw(official_shapes()))
    refused(
        folder, r"\d+ missing: [\w.]+(, [\w.]+){7} and \d+ more; 16 unexpected: [\w.]+(, [\w.]+){7} and 8 more; take"
    )


def test_a_width_that_is_not_the_tensors(tmp_path):
    config = FLA_CONFIG | {"hidden_size": 2 * D, "num_heads": 8}
    refused(
        write(tmp_path / "folder", config, TENSORS),
        r"34 misshapen: .*model\.embeddings\.weight \[300, 16\], wanted \[300, 32\]",
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_are_no_numbers_of_a_model(dtype, tmp_path):
    tensors = TENSORS | {"model.norm.weight": torch.ones(D).to(dtype)}
    refused(write(tmp_path / "folder", FLA_CONFIG, tensors), r"no floating-point numbers: model\.norm\.weight \(\S+\)")


def test_values_that_are_not_finite_are_warned_of(tmp_path):
    tensors = TENSORS | {"model.norm.weight": torch.full((D,), torch.nan)}
    opened = open_folder(write(tmp_path / "folder", FLA_CONFIG, tensors))
    model = HGRN2LM(opened.config)
    with pytest.warns(UserWarning, match=r"not finite in model\.norm\.weight$"):
        opened.load_into(model)
    assert model.model.norm.weight.isnan().all()


def test_a_tied_matrix_under_either_name_or_both(tmp_path):
    config, tensors = FLA_CONFIG | {"tie_word_embeddings": True}, draw(fla_shapes(tied=True))
    embeddings = tensors.pop("model.embeddings.weight")
    for i, names in enumerate(
        (["model.embeddings.weight"], ["lm_head.weight"], ["model.embeddings.weight", "lm_head.weight"])
    ):
        folder = write(tmp_path / str(i), config, tensors | {name: embeddings.clone() for name in names})
        assert torch.equal(open_folder(folder).read("model.embeddings.weight"), embeddings)
    both = tensors | {"model.embeddings.weight": embeddings, "lm_head.weight": embeddings + 1}
    refused(write(tmp_path / "differ", config, both), "tie_word_embeddings is true, but .* differ")
    refused(write(tmp_path / "neither", config, tensors), r"1 missing: model\.embeddings\.weight; take")


# files


def test_no_weights_or_too_many(tmp_path):
    folder = write(tmp_path / "folder", FLA_CONFIG, TENSORS)
    shutil.copyfile(folder / "model.safetensors", folder / INDEX)
    refused(folder, "holds both model.safetensors and model.safetensors.index.json")
    (folder / INDEX).unlink()
    (folder / "model.safetensors").unlink()
    refused(folder, r"no weights there \(looked for model\.safetensors, .*pytorch_model\.bin")


@pytest.mark.parametrize("cut", [0, 5, 500, -1])
def test_a_truncated_file(cut, tmp_path):
    folder = write(tmp_path / "folder", FLA_CONFIG, TENSORS)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:cut])
    refused(folder, "model.safetensors: truncated, or no safetensors file")


def test_a_truncated_shard_is_named(tmp_path):
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS)
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 4)
    refused(folder, "model-00002-of-00002.safetensors: truncated")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("cut", [0, 3, 100, 0.25, 0.5, -1, -100, -300])
def test_a_truncated_pickle(cut, zipped, tmp_path):
    folder = pickled(tmp_path / "folder", TENSORS, _use_new_zipfile_serialization=zipped)
    content = (folder / "pytorch_model.bin").read_bytes()
    size = int(cut * len(content)) if isinstance(cut, float) else cut
    (folder / "pytorch_model.bin").write_bytes(content[:size])
    refused(folder, "pytorch_model.bin: truncated, or no file of PyTorch with tensors alone")


def test_an_index_that_names_absent_files(tmp_path):
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, r"index.json: names model-00002-of-00003\.safetensors, which is not there")
    (folder / "model-00003-of-00003.safetensors").unlink()
    refused(folder, r"names model-00002-of-00003\.safetensors, model-00003-of-00003\.safetensors, which are not there")


def test_an_index_that_names_the_wrong_shard(tmp_path):
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS)

    def swap(index):
        index["weight_map"]["model.embeddings.weight"] = "model-00002-of-00002.safetensors"

    refused(
        edit_index(folder, swap), r"says that model\.embeddings\.weight is in model-00002-.*, but it is in model-00001-"
    )

    def invent(index):
        index["weight_map"] |= {
            "model.embeddings.weight": "model-00001-of-00002.safetensors",
            "model.x": "model-00001-of-00002.safetensors",
        }

    refused(edit_index(folder, invent), r"says that model\.x is in .*, but it is in no shard \(1 such tensors\)")

    def forget(index):
        del index["weight_map"]["model.x"], index["weight_map"]["model.norm.weight"]

    refused(edit_index(folder, forget), r"does not name model\.norm\.weight in model-00001-of-00002\.safetensors")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "..", ".", "", "sub/model.safetensors"])
def test_an_index_that_leaves_its_folder(file, tmp_path):
    write(tmp_path / "elsewhere", FLA_CONFIG, TENSORS)
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS)
    refused(edit_index(folder, lambda index: index["weight_map"].update(x=file)), "wanted names of files beside it")


@pytest.mark.parametrize("places", [None, [], {}, {"a": 3}])
def test_an_index_without_places(places, tmp_path):
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    refused(folder, "no weight_map from tensors to files in it")


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("how", ["zip", "legacy", "plain"])
def test_a_pickle_with_code_is_refused_and_the_code_not_run(how, tmp_path):
    mark = tmp_path / "mark"
    content = TENSORS | {"model.norm.weight": Code(mark)}
    folder = pickled(tmp_path / "folder", content, _use_new_zipfile_serialization=how == "zip")
    if how == "plain":
        with (folder / "pytorch_model.bin").open("wb") as file:
            pickle.dump({"a": Code(mark)}, file, protocol=4)
    reason = "no file of PyTorch" if how == "plain" else r"holds code \(_?io\.open\), which is not run"
    refused(folder, f"pytorch_model.bin: .*{reason}")
    assert not mark.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_pickle(zipped, tmp_path):
    folder = pickled(tmp_path / "folder", TENSORS, _use_new_zipfile_serialization=zipped)
    content = (folder / "pytorch_model.bin").read_bytes()
    for place in range(0, 1500, 50):
        changed = content[:place] + bytes([content[place] ^ 0x15]) + content[place + 1 :]
        (folder / "pytorch_model.bin").write_bytes(changed)
        # some places do not matter; at all others the reason is said
        with contextlib.suppress(UserError):
            open_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds list; wanted a table of tensors"),
        ({"state_dict": {"a": torch.ones(2)}, "step": 3}, "state_dict, step: no plain tensors"),
        ({"a": torch.eye(2).to_sparse()}, "a: no plain tensors"),
        ({3: torch.ones(2)}, "3: no plain tensors"),
    ],
)
def test_a_pickle_of_something_else(content, message, tmp_path):
    refused(pickled(tmp_path / "folder", content), message)
