"""Round trips between all layouts, and `hgrn2 convert` with what may go wrong."""

import json
import os
import sys
import warnings

import pytest
import torch

from hgrn2 import cli
from hgrn2.data import ByteTokenizer, train_bpe
from hgrn2.formats import convert as convert_module
from hgrn2.formats.convert import convert, parse_size
from hgrn2.formats.opening import open_folder
from hgrn2.formats.run_folder import read_config
from hgrn2.models import HGRN2LM, presets
from hgrn2.train.checkpoint import CheckpointStore, create_run, model_tensors
from tests.formats.command_line import refused, run_cli
from tests.formats.published import (
    FLA_CONFIG,
    HYBRID,
    OFFICIAL_CONFIG,
    VOCAB,
    assert_same_bits,
    draw,
    fla_shapes,
    merged,
    official_shapes,
    tensors_of,
    write,
    write_shards,
)
from tests.models.cases import make_model
from tests.refusals import refuses
from tests.train.tiny_run import saved_tensors


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["hgrn2"])
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["def hello(world): return hello world"] * 5, VOCAB)


def to(layout, source, out, **how):
    convert(open_folder(source), out, layout, tokenizer_dir=source, **how)
    return out


def settings(folder):
    return json.loads((folder / "config.json").read_text())


CASES = {
    "plain": (FLA_CONFIG, fla_shapes()),
    "short convolutions": (FLA_CONFIG | {"use_short_conv": True}, fla_shapes(convolutions=True)),
    "tied": (FLA_CONFIG | {"tie_word_embeddings": True}, fla_shapes(tied=True)),
    "hybrid": (FLA_CONFIG | {"attn": HYBRID}, fla_shapes(hybrid=True)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_fla_through_every_layout_and_back(case, dtype, tmp_path):
    config, shapes = CASES[case]
    tensors = draw(shapes, dtype)
    # every bit pattern travels: a NaN, an infinity, both zeros, a number below the normal ones
    strange = torch.tensor([torch.nan, -torch.inf, -0.0, 0.0, torch.finfo(dtype).tiny / 2], dtype=torch.float64)
    tensors["model.layers.0.mlp.down_proj.weight"][0, :5] = strange.to(dtype)
    fla = write(tmp_path / "fla", config, tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not finite")
        native = to("native", fla, tmp_path / "native")
        hf = to("hf", native, tmp_path / "hf")
        again = to("fla", to("native", hf, tmp_path / "native-again"), tmp_path / "fla-again")
    for folder in (native, hf, again):
        # our names are fla's
        assert_same_bits(tensors_of(folder), tensors)
        assert settings(folder)["dtype"] == str(dtype).removeprefix("torch.")
    found = settings(again)
    assert {key: found[key] for key in config.keys() & found.keys()} == {
        key: config[key] for key in config.keys() & found.keys()
    }
    assert config.keys() - found.keys() == {"transformers_version", "torch_dtype"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("further", [False, True], ids=["published", "layernorm and biases"])
def test_official_through_every_layout_and_back(further, dtype, tmp_path):
    config = OFFICIAL_CONFIG | ({"norm_type": "layernorm", "bias": True} if further else {})
    tensors = draw(official_shapes(further), dtype)
    official = write(tmp_path / "official", config, tensors)
    native = to("native", official, tmp_path / "native")
    again = to("official", to("hf", native, tmp_path / "hf"), tmp_path / "again")
    assert_same_bits(tensors_of(again), tensors)
    assert settings(again) | {"transformers_version": "4.31.0", "torch_dtype": "float32"} == config | {
        "dtype": str(dtype)[6:]
    }
    # rows of V, Q and F, written out once more
    v, q, f = tensors["model.layers.1.token_mixer.in_proj.weight"].chunk(3)
    own = tensors_of(native)
    for name, rows in (("i", v), ("q", q), ("f", f)):
        assert torch.equal(own[f"model.layers.1.attn.{name}_proj.weight"], rows)
    assert torch.equal(own["model.layers.2.mlp.gate_proj.weight"], tensors["model.layers.2.channel_mixer.l1.weight"])
    with refuses("unsupported", "fla", "mixer_norm"):
        to("fla", official, tmp_path / "fla")
    assert not (tmp_path / "fla").exists()


def test_files_of_the_old_form_become_files_of_the_new(tmp_path):
    tensors = draw(fla_shapes(hybrid=True))
    old = write_shards(tmp_path / "old", FLA_CONFIG | {"attn": HYBRID}, merged(tensors))
    assert_same_bits(tensors_of(to("fla", old, tmp_path / "new")), tensors)


def test_tensors_of_several_dtypes_stay_as_they_are(tmp_path):
    tensors = draw(fla_shapes(), torch.bfloat16) | {"model.lower_bounds": draw(fla_shapes())["model.lower_bounds"]}
    fla = write(tmp_path / "fla", FLA_CONFIG, tensors)
    hf = to("hf", fla, tmp_path / "hf")
    assert_same_bits(tensors_of(hf), tensors)
    assert settings(hf)["dtype"] == "float32"
    half = to("fla", hf, tmp_path / "half", dtype=torch.float16)
    assert_same_bits(tensors_of(half), {name: x.to(torch.float16) for name, x in tensors.items()})
    assert settings(half)["dtype"] == "float16"


def test_shards(tmp_path):
    tensors = draw(fla_shapes())
    fla = write(tmp_path / "fla", FLA_CONFIG, tensors)
    hf = to("hf", fla, tmp_path / "hf", max_shard_bytes=8000)
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in hf.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    numbers = sum(x.numel() for x in tensors.values())
    assert index["metadata"] == {"total_size": 4 * numbers, "total_parameters": numbers}
    assert index["weight_map"].keys() == tensors.keys()
    # a matrix above the limit is alone in its file, whose header is beside the 19,200 bytes
    assert all((hf / file).stat().st_size < 20_000 for file in files)
    assert_same_bits(tensors_of(to("native", hf, tmp_path / "native", max_shard_bytes=8000)), tensors)
    assert [path.name for path in (tmp_path / "native").glob("*.safetensors")] == ["model.safetensors"]


def test_what_the_settings_say(tmp_path, tokenizer):
    fla = write(tmp_path / "fla", FLA_CONFIG, draw(fla_shapes()))
    tokenizer.save(fla)
    hf = settings(to("hf", fla, tmp_path / "hf"))
    assert hf["architectures"] == ["HGRN2ForCausalLM"]
    assert hf["model_type"] == "hgrn2"
    # those of the checkpoint go before those of its tokenizer
    assert (hf["bos_token_id"], hf["eos_token_id"]) == (1, 2)
    assert (hf["mixer_norm_eps"], hf["norm_eps"]) == (1e-5, 0.01)
    assert {name: hf[name] for name in open_folder(fla).config.to_dict()} == open_folder(fla).config.to_dict()


# runs


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run folder with one checkpoint, as training leaves it."""
    config = presets.variant(
        "fla", vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, expand_ratio=4, intermediate_size=24
    )
    model = make_model(config, torch.float32)
    create_run(tmp_path / "run", {"model": config.to_dict(), "train": {}, "data": {}}, tokenizer)
    CheckpointStore(tmp_path / "run", 1).save(
        model=model_tensors(model), optimizer={}, task={}, state={"step": 3, "best": {"step": 3}},
        config={"model": config.to_dict(), "train": {}, "data": {}}, best_step=3,
    )  # fmt: skip
    return tmp_path / "run"


def test_a_run_in_every_layout_writes_the_same(run, capsys, tokenizer):
    def written(folder):
        return run_cli(capsys, "generate", folder, "--prompt", "def", "--temperature", "0", "--max-tokens", "30")

    wanted = written("run")
    assert len(wanted) > 10
    assert run_cli(capsys, "convert", "run", "a", "--to", "fla").startswith("a: 34 tensors, ")
    run_cli(capsys, "convert", "a", "b", "--to", "hf", "--max-shard-size", "8KB")
    run_cli(capsys, "convert", "b", "c", "--to", "native", "--checkpoint", "best")
    for folder in ("a", "b", "c"):
        assert written(folder) == wanted
        assert "16" in run_cli(capsys, "info", folder)
    for folder in ("a", "b"):
        found = settings(run.parent / folder)
        assert {found[f"{use}_token_id"] for use in ("bos", "eos", "pad")} == {tokenizer.eot_id}
    with open("text.txt", "w") as file:
        file.write("def hello world")
    assert run_cli(capsys, "eval", "b", "text.txt") == run_cli(capsys, "eval", "run", "text.txt")
    # what reads runs reads it, and knows its settings
    assert read_config(run.parent / "c")["model"] == settings(run)["model"]
    assert_same_bits(saved_tensors(run.parent / "c"), saved_tensors(run))


def test_a_run_as_one_folder_to_hand_on(tmp_path, capsys):
    config = presets.variant(
        "fla", vocab_size=260, hidden_size=16, num_hidden_layers=1, expand_ratio=4, intermediate_size=24
    )
    train = {"max_steps": 3, "teacher": "/a/place/big"}
    kept = {"model": config.to_dict(), "train": train, "data": {"data": ["a/private/place"]}}
    create_run(tmp_path / "run", kept, ByteTokenizer())
    store, models = CheckpointStore(tmp_path / "run", 2), [make_model(config, torch.float32, seed=i) for i in range(2)]
    for step, model in enumerate(models, 1):
        store.save(
            model=model_tensors(model), optimizer={}, task={}, state={"step": step, "best": {"step": 1}}, config=kept,
            best_step=1,
        )  # fmt: skip
    for which, model in zip(("best", "latest"), models, strict=True):
        run_cli(capsys, "convert", "run", which, "--to", "native", "--checkpoint", which)
        assert_same_bits(tensors_of(tmp_path / which), dict(model.named_parameters()))
    assert sorted(os.listdir("best")) == [
        "bytes_tokenizer.json", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    ids = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    further = {"model_type": "hgrn2", "architectures": ["HGRN2ForCausalLM"], "dtype": "float32"}
    # how it was trained stays, where the data and the teacher lie does not
    there = {"model": kept["model"], "train": train | {"teacher": "big"}}
    assert settings(tmp_path / "best") == there | ids | further
    # three tokens of the model's the tokenizer does not know
    found = json.loads((tmp_path / "best" / "generation_config.json").read_text())
    assert found == ids | {"suppress_tokens": [257, 258, 259]}


@pytest.mark.parametrize("text", ["{", "", "[]", "\x00"])
def test_a_damaged_tokenizer_is_not_handed_on(tmp_path, capsys, text):
    fla = write(tmp_path / "fla", FLA_CONFIG, draw(fla_shapes()))
    (fla / "tokenizer.json").write_text(text)
    refused(capsys, ["convert", fla, tmp_path / "out", "--to", "hf"], "tokenizer.json: ")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_s_files_are_taken_along(tmp_path, capsys, tokenizer):
    fla = write(tmp_path / "fla", FLA_CONFIG, draw(fla_shapes()))
    tokenizer.save(fla)
    named = [
        "chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tekken.json", "tokenizer.model",
        "tokenizer.model.v3", "tokenizer_config.json",
    ]  # fmt: skip
    for name in [*named, "notes.txt"]:
        (fla / name).write_text(json.dumps({"this": name}))
    (fla / "chat_templates").mkdir()
    # where transformers puts every template but the first
    templates = "additional_chat_templates"
    (fla / templates).mkdir()
    for name in ("rag.jinja", "tool_use.jinja"):
        (fla / templates / name).write_text(name)
    run_cli(capsys, "convert", fla, "out", "--to", "hf")
    there = sorted([*named, templates, "README.md", "config.json", "model.safetensors", "tokenizer.json"])
    assert sorted(os.listdir("out")) == there
    assert sorted(os.listdir(f"out/{templates}")) == ["rag.jinja", "tool_use.jinja"]
    for name in [*named, "tokenizer.json", f"{templates}/rag.jinja", f"{templates}/tool_use.jinja"]:
        assert (tmp_path / "out" / name).read_bytes() == (fla / name).read_bytes()


@pytest.mark.parametrize("value", [{"a": 1}, "2", 2.0, True, [1, None], [[1]], [False]], ids=str)
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id", "pad_token_id"])
def test_token_ids_that_are_none(key, value, tmp_path, capsys):
    write(tmp_path / "fla", FLA_CONFIG | {key: value}, draw(fla_shapes()))
    message = f"{key} is {value!r}; wanted a whole number, a list of them, or null"
    refused(capsys, ["convert", "fla", "out", "--to", "hf"], message)


# -1 is what the first Llamas have where there is no token to fill with
@pytest.mark.parametrize("value", [2, -1, [1, 2], [], None], ids=str)
def test_token_ids_are_passed_on(value, tmp_path):
    fla = write(tmp_path / "fla", FLA_CONFIG | {"eos_token_id": value, "pad_token_id": value}, draw(fla_shapes()))
    found = settings(to("hf", fla, tmp_path / "out"))
    assert (found["eos_token_id"], found["pad_token_id"]) == (value, value)


def test_a_run_s_tokenizer_gets_the_form_of_transformers_too(run, capsys):
    run_cli(capsys, "convert", run, "out", "--to", "hf")
    assert sorted(os.listdir("out")) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_bytes_are_a_tokenizer_too(tmp_path, capsys):
    fla = write(tmp_path / "fla", {**FLA_CONFIG, "bos_token_id": 256}, draw(fla_shapes()))
    refused(capsys, ["generate", "fla"], "holds no tokenizer.json")
    ByteTokenizer().save(fla)
    run_cli(capsys, "convert", "fla", "out", "--to", "native")
    assert run_cli(capsys, "generate", "out", "--max-tokens", "5", "--seed", "1")


def test_another_dtype_from_the_command_line(run, capsys):
    run_cli(capsys, "convert", run, "out", "--to", "fla", "--dtype", "bfloat16")
    assert {x.dtype for x in tensors_of(run.parent / "out").values()} == {torch.bfloat16}


# what may go wrong


def test_nothing_is_ever_overwritten(run, capsys):
    os.mkdir("out")
    refused(capsys, ["convert", "run", "out", "--to", "fla"], "error: out: exists already; name a new folder")
    assert os.listdir("out") == []
    os.symlink("nowhere", "link")
    refused(capsys, ["convert", "run", "link", "--to", "fla"], "link: exists already")
    refused(capsys, ["convert", "run", "run", "--to", "native"], "run: exists already")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "nothing", "out", "--to", "fla"], "nothing: no model there"),
        (["convert", "run", "out"], "--to"),
        (["convert", "run", "out", "--to", "llama"], "llama"),
        (["convert", "run", "out", "--to", "fla", "--dtype", "int8"], "int8"),
        (["convert", "run", "out", "--to", "fla", "--max-shard-size", "much"], "size 'much': wanted a number of bytes"),
        (["convert", "run", "out", "--to", "official"], "hgru2-pytorch's layout cannot express scale = 0.5"),
        (["convert", "run", "run/config.json/out", "--to", "fla"], "cannot be written"),
    ],
)
def test_bad_requests(run, capsys, args, message):
    refused(capsys, args, message)
    assert not os.path.exists("out")


def test_a_changed_checkpoint_of_a_run(run, capsys):
    file = run / "checkpoints" / "step-00000003" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(capsys, ["convert", "run", "out", "--to", "fla"], "model.safetensors is truncated or was changed")


def test_folders_that_are_wrong(tmp_path, capsys):
    tensors = draw(fla_shapes())
    write(tmp_path / "other", FLA_CONFIG | {"model_type": "gla"}, tensors)
    refused(capsys, ["convert", "other", "out", "--to", "hf"], "model_type is 'gla'; wanted 'hgrn2'")
    write(tmp_path / "heads", FLA_CONFIG | {"num_heads": 8}, tensors)
    refused(capsys, ["generate", "heads"], "num_heads = 8 contradicts")
    refused(capsys, ["info", "heads"], "num_heads = 8 contradicts")
    del tensors["model.norm.weight"]
    write(tmp_path / "missing", FLA_CONFIG, tensors)
    refused(capsys, ["convert", "missing", "out", "--to", "hf"], "1 missing: model.norm.weight")
    refused(capsys, ["eval", "missing", "missing/config.json"], "1 missing: model.norm.weight")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_nothing(failure, run, capsys, monkeypatch):
    write_one, calls = convert_module.write_safetensors, []

    def fail(path, tensors, read):
        calls.append(path)
        if len(calls) == 2:
            raise failure
        return write_one(path, tensors, read)

    monkeypatch.setattr(convert_module, "write_safetensors", fail)
    before = sorted(os.listdir())
    status = cli.main(["convert", "run", "new/out", "--to", "hf", "--max-shard-size", "8KB"])
    assert len(calls) == 2
    assert sorted(os.listdir()) == before
    if isinstance(failure, OSError):
        assert status == 2
        assert "error: new/out: the disk is full" in capsys.readouterr().err
    else:
        assert status == 130


class Interrupted:
    """A source that does something else first, when it is asked for something for the first time."""

    def __init__(self, source, name, act):
        self.source, self.name, self.act = source, name, act

    def __getattr__(self, name):
        if name == self.name and self.act is not None:
            self.act, act = None, self.act
            act()
        return getattr(self.source, name)


def test_the_folder_made_by_another_process_meanwhile_stays(run):
    def appear():
        # as if it had been made while this one waited for the lock
        (run.parent / "out").mkdir()
        (run.parent / "out" / "theirs").touch()

    source = Interrupted(open_folder(run / "checkpoints" / "step-00000003"), "spec", appear)
    with refuses("already-exists", "out"):
        convert(source, run.parent / "out", "fla", tokenizer_dir=run)
    assert os.listdir("out") == ["theirs"]


def test_values_that_are_not_finite_are_warned_of_on_the_command_line(tmp_path, capsys):
    tensors = draw(fla_shapes())
    tensors["model.norm.weight"][3] = 1e10
    write(tmp_path / "fla", FLA_CONFIG, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main(["convert", "fla", "out", "--to", "hf", "--dtype", "float16"]) == 0
    assert "warning: " in (err := capsys.readouterr().err)
    assert "values that are not finite in model.norm.weight" in err


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2**21), ("1GiB", 2**30), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1GB", "5XB", "GB", "1e9", "0.2"])
def test_sizes_that_are_none(text):
    with refuses("invalid-value", repr(text)):
        parse_size(text)


def test_a_model_of_ours_is_what_comes_back(tmp_path):
    config = presets.variant("official-lra", vocab_size=29, hidden_size=16, num_hidden_layers=2, expand_ratio=4)
    model = make_model(config, torch.float32)
    create_run(tmp_path / "run", {"model": config.to_dict()})
    CheckpointStore(tmp_path / "run", 1).save(
        model=model_tensors(model), optimizer={}, task={}, state={"step": 1}, config={"model": config.to_dict()},
        best_step=None,
    )  # fmt: skip
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    opened = open_folder(to("hf", folder, tmp_path / "hf"))
    assert opened.config == config
    again = HGRN2LM(config)
    opened.load_into(again)
    assert_same_bits(dict(again.named_parameters()), dict(model.named_parameters()))
    assert settings(tmp_path / "hf")["eos_token_id"] is None


def test_a_folder_that_appears_while_one_is_written_stays(run, tmp_path):
    def appear():
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")

    (tmp_path / ".out.old").mkdir()
    before = sorted(tmp_path.iterdir())
    source = Interrupted(open_folder(run / "checkpoints" / "step-00000003"), "read", appear)
    with refuses("already-exists", "out"):
        convert(source, tmp_path / "out", "native", tokenizer_dir=run)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "out"])
    assert (tmp_path / "out" / "precious").read_text() == "mine"


@pytest.mark.parametrize("damage", ["[1]", '{"version": "1.0", "model"'])
def test_a_damaged_tokenizer_is_not_taken_along(damage, run, capsys):
    for file in run.rglob("tokenizer.json"):
        file.write_text(damage)
    refused(capsys, ["convert", "run", "out", "--to", "hf"], "tokenizer")


def test_places_that_cannot_be(run, capsys):
    for name in ("a" * 250, "a" * 300):
        refused(capsys, ["convert", "run", name, "--to", "fla"], "too long")
    refused(capsys, ["convert", "a" * 300, "out", "--to", "fla"], "too long")
