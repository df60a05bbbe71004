"""Valid content of folders, and every fault that it may have."""

import contextlib
import json
import os
import pickle
import re
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
from tests.refusals import refuses

TENSORS = draw(fla_shapes())
INDEX = "model.safetensors.index.json"


def read_all(folder):
    opened = open_folder(folder)
    return {name: opened.read(name) for name in opened.places}


def refused(folder, code, *names):
    with refuses(code, *names) as error:
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
    ("config", "code", "names"),
    [
        (FLA_CONFIG | {"model_type": "gla"}, "unsupported", ["model_type", "'gla'", "'hgrn2'"]),
        ({"model_type": "hgrn2", "hidden_size": 16}, "unreadable", ["'model'", "'attn_mode'"]),
        (FLA_CONFIG | {"glu_act": "none"}, "contradiction", ["attn_mode of fla", "glu_act of hgru2-pytorch"]),
        (FLA_CONFIG | {"mixer_norm": "rmsnorm"}, "contradiction", ["mixer_norm of hgrn2.hf", "attn_mode of fla"]),
        (FLA_CONFIG | {"model": {}}, "contradiction", ["model of a run", "attn_mode of fla"]),
        ({"model": {"hidden_size": 16}, "hidden_size": 16}, "contradiction", ["hidden_size", "'model'"]),
        ({"model": {"hidden_size": 16}, "trian": {}}, "unknown-name", ["'trian'", "'train'"]),
        ({"model": 3}, "invalid-value", ["model config", "int"]),
        ({"mixer_norm": "rmsnorm", "hidden_sise": 16}, "unknown-name", ["'hidden_sise'", "'hidden_size'"]),
        (FLA_CONFIG | {"num_heads": 2}, "contradiction", ["num_heads = 2", "hidden_size / expand_ratio = 4"]),
        ([1], "unreadable", ["config.json", "list"]),
        (FLA_CONFIG | {"num_hidden_layers": 4000}, "mismatch", ["4000 layers", "34 tensors"]),
    ],
)
def test_settings_that_are_ambiguous_or_of_another_model(config, code, names, tmp_path):
    refused(write(tmp_path / "folder", config, TENSORS), code, *names)


def test_no_settings_or_no_json(tmp_path):
    folder = write(tmp_path / "folder", FLA_CONFIG, TENSORS)
    (folder / "config.json").write_text("{")
    refused(folder, "unreadable", "config.json", "JSON")
    (folder / "config.json").write_bytes(b"\xff\xfe")
    refused(folder, "unreadable", "config.json", "JSON")
    (folder / "config.json").write_text("[" * 100_000)
    refused(folder, "unreadable", "config.json", "JSON")
    (folder / "config.json").unlink()
    refused(folder, "not-found", "config.json")
    (folder / "config.json").mkdir()
    refused(folder, "unreadable", "config.json")


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
        "mismatch",
        "2 missing: model.layers.2.attn.q_proj.weight, lm_head.weight;",
        "2 unexpected: model.extra, score.weight;",
        "1 misshapen: model.norm.weight [7]",
        "[16]",
    )


def test_a_name_of_two_lines_is_shown_in_one(tmp_path):
    tensors = TENSORS | {"first\nsecond": torch.zeros(2)}
    refused(write(tmp_path / "folder", FLA_CONFIG, tensors), "mismatch", r"1 unexpected: 'first\nsecond'")


def test_a_long_list_is_cut_and_counted(tmp_path):
    folder = write(tmp_path / "official-tensors", FLA_CONFIG, draw(official_shapes()))
    with refuses("mismatch", folder) as caught:
        open_folder(folder)
    some = r"[\w.]+(, [\w.]+){7}"
    assert re.search(rf"\d+ missing: {some} and \d+ more; 16 unexpected: {some} and 8 more;", str(caught.value))


def test_a_width_that_is_not_the_tensors(tmp_path):
    config = FLA_CONFIG | {"hidden_size": 2 * D, "num_heads": 8}
    refused(
        write(tmp_path / "folder", config, TENSORS),
        "mismatch",
        "34 misshapen",
        "model.embeddings.weight [300, 16]",
        "[300, 32]",
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_are_no_numbers_of_a_model(dtype, tmp_path):
    tensors = TENSORS | {"model.norm.weight": torch.ones(D).to(dtype)}
    refused(write(tmp_path / "folder", FLA_CONFIG, tensors), "unsupported", "model.norm.weight")


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
    refused(write(tmp_path / "differ", config, both), "contradiction", "tie_word_embeddings", "lm_head.weight")
    refused(write(tmp_path / "neither", config, tensors), "mismatch", "1 missing: model.embeddings.weight")


# files


def test_no_weights_or_too_many(tmp_path):
    folder = write(tmp_path / "folder", FLA_CONFIG, TENSORS)
    shutil.copyfile(folder / "model.safetensors", folder / INDEX)
    refused(folder, "contradiction", "model.safetensors and model.safetensors.index.json")
    (folder / INDEX).unlink()
    (folder / "model.safetensors").unlink()
    refused(folder, "not-found", "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize("cut", [0, 5, 500, -1])
def test_a_truncated_file(cut, tmp_path):
    folder = write(tmp_path / "folder", FLA_CONFIG, TENSORS)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:cut])
    refused(folder, "unreadable", "model.safetensors")


def test_a_truncated_shard_is_named(tmp_path):
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS)
    shard = folder / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 4)
    refused(folder, "unreadable", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("cut", [0, 3, 100, 0.25, 0.5, -1, -100, -300])
def test_a_truncated_pickle(cut, zipped, tmp_path):
    folder = pickled(tmp_path / "folder", TENSORS, _use_new_zipfile_serialization=zipped)
    content = (folder / "pytorch_model.bin").read_bytes()
    size = int(cut * len(content)) if isinstance(cut, float) else cut
    (folder / "pytorch_model.bin").write_bytes(content[:size])
    refused(folder, "unreadable", "pytorch_model.bin")


def test_an_index_that_names_absent_files(tmp_path):
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS, 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, "not-found", "index.json", "model-00002-of-00003.safetensors")
    (folder / "model-00003-of-00003.safetensors").unlink()
    refused(folder, "not-found", "model-00002-of-00003.safetensors, model-00003-of-00003.safetensors")


def test_an_index_that_names_the_wrong_shard(tmp_path):
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS)

    def swap(index):
        index["weight_map"]["model.embeddings.weight"] = "model-00002-of-00002.safetensors"

    refused(edit_index(folder, swap), "damaged", "model.embeddings.weight", "model-00002-of", "model-00001-of")

    def invent(index):
        index["weight_map"] |= {
            "model.embeddings.weight": "model-00001-of-00002.safetensors",
            "model.x": "model-00001-of-00002.safetensors",
        }

    refused(edit_index(folder, invent), "damaged", "model.x", "model-00001-of", "no shard")

    def forget(index):
        del index["weight_map"]["model.x"], index["weight_map"]["model.norm.weight"]

    refused(edit_index(folder, forget), "damaged", "model.norm.weight", "model-00001-of-00002.safetensors")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "..", ".", "", "sub/model.safetensors"])
def test_an_index_that_leaves_its_folder(file, tmp_path):
    write(tmp_path / "elsewhere", FLA_CONFIG, TENSORS)
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS)
    refused(edit_index(folder, lambda index: index["weight_map"].update(x=file)), "damaged", repr(file))


@pytest.mark.parametrize("places", [None, [], {}, {"a": 3}])
def test_an_index_without_places(places, tmp_path):
    folder = write_shards(tmp_path / "folder", FLA_CONFIG, TENSORS)
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))
    refused(folder, "damaged", INDEX, "weight_map")


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
    refused(folder, "unreadable", "pytorch_model.bin", *(() if how == "plain" else ("io.open",)))
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
    ("content", "name"),
    [
        ([torch.ones(2)], "list"),
        ({"state_dict": {"a": torch.ones(2)}, "step": 3}, "state_dict, step"),
        ({"a": torch.eye(2).to_sparse()}, "a:"),
        ({3: torch.ones(2)}, "3:"),
    ],
)
def test_a_pickle_of_something_else(content, name, tmp_path):
    refused(pickled(tmp_path / "folder", content), "unreadable", "pytorch_model.bin", name)
