"""Recurrent layers in place of a Transformer's attention: what is copied, what is new, and `hgrn2 convert`."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from hgrn2.data import train_bpe
from hgrn2.errors import UserError
from hgrn2.formats.opening import open_folder
from hgrn2.formats.start import parse_layers, start_from_transformer
from hgrn2.models import HGRN2LM, presets
from tests.formats.command_line import refused, run_cli
from tests.formats.llama import LLAMA, TENSORS, VOCAB, D, L, shapes
from tests.formats.published import (
    FLA_CONFIG,
    LLAMA_3_ROPE,
    assert_same_bits,
    draw,
    fla_shapes,
    tensors_of,
    write,
    write_shards,
)
from tests.refusals import refuses


@pytest.fixture
def llama(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hgrn2"])
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "llama", LLAMA, TENSORS)
    train_bpe(["some text, some more text"] * 3, VOCAB).save(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def copied(layers, kept=()):
    """Tensors that must equal the Transformer's to the last bit, by our names."""
    found = {
        "model.embeddings.weight": TENSORS["model.embed_tokens.weight"],
        "model.norm.weight": TENSORS["model.norm.weight"],
        "lm_head.weight": TENSORS["lm_head.weight"],
    }
    for i in layers:
        theirs, ours = f"model.layers.{i}.", f"model.layers.{i}."
        for part in ("gate_proj", "up_proj", "down_proj"):
            found[f"{ours}mlp.{part}.weight"] = TENSORS[f"{theirs}mlp.{part}.weight"]
        found[f"{ours}attn_norm.weight"] = TENSORS[f"{theirs}input_layernorm.weight"]
        found[f"{ours}mlp_norm.weight"] = TENSORS[f"{theirs}post_attention_layernorm.weight"]
        for part in "qkvo" if i in kept else "o":
            found[f"{ours}attn.{part}_proj.weight"] = TENSORS[f"{theirs}self_attn.{part}_proj.weight"]
    return found


def test_every_tensor_is_copied_or_new(llama, capsys):
    assert run_cli(capsys, "convert", "--from-transformer", "llama", "out").startswith("out: 44 tensors, ")
    found, wanted = tensors_of(llama.parent / "out"), copied(range(L))
    assert_same_bits({name: found[name] for name in wanted}, wanted)
    new = found.keys() - wanted.keys()
    assert new == {"model.lower_bounds"} | {
        f"model.layers.{i}.attn.{x}.weight" for i in range(L) for x in ("q_proj", "f_proj", "i_proj", "g_norm")
    }
    model = HGRN2LM(open_folder(llama.parent / "out").config)
    open_folder(llama.parent / "out").load_into(model)
    # the bound of layer l is l / L
    torch.testing.assert_close(torch.stack(model.model.bounds()), (torch.arange(L) / L).unsqueeze(1).expand(L, D))
    projections = torch.stack([found[f"model.layers.{i}.attn.{x}_proj.weight"] for i in range(L) for x in "qfi"])
    assert float(projections.std()) == pytest.approx(0.05, rel=0.05)
    # each is drawn by itself
    assert len({x.sum().item() for x in projections}) == 3 * L
    for i in range(L):
        v, gain = (
            TENSORS[f"model.layers.{i}.self_attn.v_proj.weight"],
            TENSORS[f"model.layers.{i}.input_layernorm.weight"],
        )
        x = torch.randn(20000, D, generator=torch.Generator().manual_seed(i)) * gain
        size = (x @ v.T).square().mean().sqrt()
        g = found[f"model.layers.{i}.attn.g_norm.weight"]
        assert g.unique().numel() == 1
        assert float(g[0]) == pytest.approx(0.25 * float(size), rel=0.02)


def test_q_and_v_of_the_attention(llama, capsys):
    run_cli(capsys, "convert", "--from-transformer", "llama", "out", "--copy-qv", "--to", "native")
    found = tensors_of(llama.parent / "out")
    for i in range(L):
        theirs = f"model.layers.{i}.self_attn."
        assert torch.equal(found[f"model.layers.{i}.attn.q_proj.weight"], TENSORS[f"{theirs}q_proj.weight"])
        # 4 heads of q over 2 of v: each of v serves two neighbours
        a, b = TENSORS[f"{theirs}v_proj.weight"].chunk(2)
        assert torch.equal(found[f"model.layers.{i}.attn.i_proj.weight"], torch.cat([a, a, b, b]))


@pytest.mark.parametrize(("text", "kept"), [("every:2", (1, 3)), ("0,2", (0, 2)), ("3", (3,))])
def test_hybrids(text, kept, llama, capsys):
    run_cli(capsys, "convert", "--from-transformer", "llama", "out", "--keep-attention", text, "--expand-ratio", "8")
    opened = open_folder(llama.parent / "out")
    assert opened.config.attn is not None
    assert (opened.config.attn.layers, opened.config.num_heads, opened.config.use_lower_bound) == (kept, 2, True)
    found, wanted = tensors_of(llama.parent / "out"), copied(range(L), kept)
    assert_same_bits({name: found[name] for name in wanted}, wanted)
    recurrent = [i for i in range(L) if i not in kept]
    assert found.keys() - wanted.keys() == {"model.lower_bounds"} | {
        f"model.layers.{i}.attn.{x}.weight" for i in recurrent for x in ("q_proj", "f_proj", "i_proj", "g_norm")
    }


def test_attention_that_is_kept_computes_the_same(llama):
    """The mixers switched off on both sides: what is left are the kept layers and all that was copied."""
    source = open_folder(llama)
    start = start_from_transformer(source, keep_attention=(1, 2))
    whole, hybrid = HGRN2LM(source.config), HGRN2LM(start.config)
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            parameter.copy_(start.read(name))
        source.load_into(whole)
        for model in (whole, hybrid):
            for i in (0, 3):
                model.model.layers[i].attn.o_proj.weight.zero_()  # pyright: ignore
        ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
        assert torch.equal(hybrid(ids)[0], whole(ids)[0])


@pytest.mark.parametrize(
    "positions",
    [
        LLAMA_3_ROPE,
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        {"model_type": "mistral", "sliding_window": "all"},
        {"partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_positions_matter_to_attention_alone(positions, llama, capsys):
    run_cli(capsys, "convert", "--from-transformer", "llama", "plain", "--copy-qv")
    write(llama.parent / "other", LLAMA | positions, TENSORS)
    (llama / "tokenizer.json").rename(llama.parent / "other" / "tokenizer.json")
    run_cli(capsys, "convert", "--from-transformer", "other", "out", "--copy-qv", "--keep-attention", "none")
    assert_same_bits(tensors_of(llama.parent / "out"), tensors_of(llama.parent / "plain"))
    assert (llama.parent / "out" / "config.json").read_text() == (llama.parent / "plain" / "config.json").read_text()


def test_positions_of_layers_that_are_kept(llama, capsys):
    write(llama.parent / "llama3", LLAMA | LLAMA_3_ROPE, TENSORS)
    wanted = "config.json: llama config: rope_scaling of type 'llama3'; wanted none"
    for kept in ("every:4", "all"):
        flags = ["--from-transformer", "llama3", "out", "--keep-attention", kept]
        refused(capsys, ["convert", *flags], wanted)
    # nor as it is
    refused(capsys, ["convert", "llama3", "out", "--to", "hf"], wanted)
    # nor are windows at some layers only
    some = LLAMA | {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"] * 2}
    source = open_folder(write(llama.parent / "qwen2", some, draw(shapes(biases=True))), attends=False)
    assert start_from_transformer(source).config.attn is None
    with refuses("unsupported", "layer_types", "sliding_attention"):
        start_from_transformer(source, keep_attention=[1])
    # those that our attention has are kept, however the source was opened
    write(llama.parent / "base", LLAMA | {"model_type": "mistral", "sliding_window": 5, "rope_theta": 300.0}, TENSORS)
    start = start_from_transformer(open_folder(llama.parent / "base", attends=False), keep_attention=[1])
    attn = start.config.attn
    assert attn is not None
    assert (attn.layers, attn.window_size, attn.rope_theta) == ((1,), 5, 300.0)


def test_all_layers_kept_is_the_transformer(llama, capsys):
    run_cli(capsys, "convert", "--from-transformer", "llama", "kept", "--keep-attention", "all")
    run_cli(capsys, "convert", "llama", "whole", "--to", "hf")
    assert_same_bits(tensors_of(llama.parent / "kept"), tensors_of(llama.parent / "whole"))
    assert (llama.parent / "kept" / "config.json").read_text() == (llama.parent / "whole" / "config.json").read_text()


def test_what_is_new_depends_on_the_seed_alone(llama):
    source = open_folder(llama)
    one, again, other = (start_from_transformer(source, seed=seed) for seed in (3, 3, 4))
    names = one.names
    for name in reversed(names):
        again.read(name)
    same = [name for name in names if torch.equal(one.read(name), other.read(name))]
    assert all(torch.equal(one.read(name), again.read(name)) for name in names)
    assert len(names) - len(same) == 3 * L


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_new_tensors_have_the_dtype_of_their_neighbours(dtype, tmp_path):
    folder = write_shards(tmp_path / "llama", LLAMA, draw(shapes(), dtype))
    start = start_from_transformer(open_folder(folder))
    assert {start.spec(name).dtype for name in start.names} == {dtype}
    assert {start.read(name).dtype for name in start.names} == {dtype}


def test_a_tied_head(tmp_path):
    tied = {name: x for name, x in TENSORS.items() if name != "lm_head.weight"}
    start = start_from_transformer(open_folder(write(tmp_path / "llama", LLAMA | {"tie_word_embeddings": True}, tied)))
    assert start.config.tie_word_embeddings
    assert "lm_head.weight" not in start.names
    assert torch.equal(start.read("model.embeddings.weight"), TENSORS["model.embed_tokens.weight"])


def test_biases(tmp_path):
    source = open_folder(write(tmp_path / "qwen2", LLAMA | {"model_type": "qwen2"}, draw(shapes(biases=True))))
    plain = start_from_transformer(source)
    gain, v = (source.read(f"model.layers.0.{name}.weight") for name in ("attn_norm", "attn.v_proj"))
    bias = source.read("model.layers.0.attn.v_proj.bias")
    size = ((v * gain).square().sum(1) + bias.square()).mean().sqrt()
    torch.testing.assert_close(plain.read("model.layers.0.attn.g_norm.weight"), 0.25 * size.expand(D))
    with pytest.warns(UserWarning, match="biases of q and v are left out"):
        start_from_transformer(source, copy_qv=True, keep_attention=[1])
    # kept layers keep theirs
    assert "model.layers.1.attn.k_proj.bias" in start_from_transformer(source, keep_attention=[1]).names


def test_the_folder_is_opened_by_everything(llama, capsys):
    run_cli(capsys, "convert", "--from-transformer", "llama", "out", "--keep-attention", "every:4", "--copy-qv")
    settings = json.loads((llama.parent / "out" / "config.json").read_text())
    assert (settings["bos_token_id"], settings["eos_token_id"], settings["dtype"]) == (7, 0, "float32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (llama.parent / "out" / name).read_bytes() == (llama / name).read_bytes()
    (llama.parent / "text.txt").write_text("some text, some more text")
    for folder in ("llama", "out"):
        assert len(run_cli(capsys, "generate", folder, "--prompt", "some", "--max-tokens", "5", "--seed", "1")) > 5
        assert "bits/byte" in run_cli(capsys, "eval", folder, "text.txt")
        assert "4 layers" in run_cli(capsys, "info", folder)
    run_cli(capsys, "convert", "out", "for-fla", "--to", "fla")
    assert_same_bits(tensors_of(llama.parent / "for-fla"), tensors_of(llama.parent / "out"))


def test_opened_by_transformers(llama, capsys):
    transformers = pytest.importorskip("transformers")
    import hgrn2.hf  # noqa: F401

    run_cli(capsys, "convert", "--from-transformer", "llama", "out", "--keep-attention", "1", "--max-shard-size", "9KB")
    model, report = transformers.AutoModelForCausalLM.from_pretrained("out", output_loading_info=True)
    assert not any(report.values())
    opened = open_folder(llama.parent / "out")
    own = HGRN2LM(opened.config).eval()
    opened.load_into(own)
    ids = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, own(ids)[0])


# what may go wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep-attention", "4"], "has no layers [4] to keep; it has 0 to 3"),
        (["--keep-attention", "every:0"], "layers 'every:0': wanted numbers such as 3,7,11, or every:4, all or none"),
        (["--keep-attention", "1,-2"], "layers '1,-2'"),
        (["--expand-ratio", "5"], "hidden_size = 16 is not a multiple of expand_ratio = 5"),
        (["--expand-ratio", "0"], "expand_ratio is 0; wanted at least 1"),
        (["--seed", "-1"], "seed is -1; wanted 0 to"),
        (["--to", "official"], "hgru2-pytorch's layout cannot express"),
        (["--keep-attention", "nothing", "--to", "fla"], "layers 'nothing'"),
    ],
)
def test_flags_that_do_not_go_with_the_model(flags, message, llama, capsys):
    refused(capsys, ["convert", "--from-transformer", "llama", "out", *flags], message)


def test_flags_that_do_not_go_with_each_other(llama, capsys):
    refused(capsys, ["convert", "llama", "out", "--to", "hf", "--copy-qv"], "go with --from-transformer")
    refused(capsys, ["convert", "llama", "out"], "--to is missing")
    write(llama.parent / "fla", FLA_CONFIG, draw(fla_shapes()))
    refused(capsys, ["convert", "--from-transformer", "fla", "out"], "fla: has the layout of fla; wanted a Transformer")
    refused(capsys, ["convert", "--from-transformer", "llama", "llama"], "llama: exists already")


def test_damaged_transformers(llama, capsys):
    few = dict(list(TENSORS.items())[:-1])
    write(llama.parent / "few", LLAMA, few)
    missing = f"1 missing: {list(TENSORS)[-1]}"
    refused(capsys, ["convert", "--from-transformer", "few", "out"], missing)
    shards = write_shards(llama.parent / "cut", LLAMA, TENSORS)
    file = next(iter(sorted(shards.glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-10])
    refused(capsys, ["convert", "--from-transformer", "cut", "out"], "truncated, or not a safetensors file")
    file.unlink()
    refused(capsys, ["convert", "--from-transformer", "cut", "out"], f"names {file.name}, which is not there")
    whole = {name: x.to(torch.int8) if "layers.2.mlp.up_proj" in name else x for name, x in TENSORS.items()}
    save_file(whole, llama / "model.safetensors", {"format": "pt"})
    refused(
        capsys, ["convert", "--from-transformer", "llama", "out"], "not floating-point numbers: model.layers.2.mlp.up"
    )


def test_nothing_is_left_when_writing_fails(llama, capsys, monkeypatch):
    from hgrn2.formats.start import TransformerStart

    def fail(self, name):
        raise UserError("the disk is gone")

    monkeypatch.setattr(TransformerStart, "read", fail)
    refused(capsys, ["convert", "--from-transformer", "llama", "out"], "the disk is gone")


def test_layers_as_people_name_them():
    assert parse_layers("every:4", 30) == (3, 7, 11, 15, 19, 23, 27)
    assert parse_layers(" 7, 3,3", 8) == (3, 7)
    assert parse_layers("all", 3) == (0, 1, 2)
    assert parse_layers("none", 3) == ()
    with refuses("invalid-value", "'every:4'", "3"):
        parse_layers("every:4", 3)


def test_a_model_of_ours_is_no_transformer(tmp_path):
    config = presets.variant("fla", vocab_size=30, hidden_size=16, num_hidden_layers=1, expand_ratio=4)
    folder = write(tmp_path / "own", config.to_dict(), {n: p.data for n, p in HGRN2LM(config).named_parameters()})
    with refuses("unsupported", folder, "hgrn2.hf"):
        start_from_transformer(open_folder(folder))
