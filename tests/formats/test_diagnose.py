"""Folders and files that are no language model, named where one is wanted."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
import peft
import transformers

from hgrn2 import cli
from hgrn2.data import ByteTokenizer
from hgrn2.formats.diagnose import check_is_model
from hgrn2.formats.opening import open_folder
from hgrn2.hf import HGRN2Config, HGRN2ForCausalLM, HGRN2ForSequenceClassification
from tests.formats.command_line import refused, run_cli
from tests.formats.published import FLA_CONFIG, draw, fla_shapes, merged, write

COMMANDS = {
    "convert": ["--to", "native"], "convert --from-transformer": [], "generate": [], "eval": ["text.txt"],
    "train --device cpu --data text.txt --from": [],
}  # fmt: skip


def refused_everywhere(capsys, name, message, commands=tuple(COMMANDS)):
    for command in commands:
        words = command.split()
        out = ["out"] if words[0] == "convert" else []
        refused(capsys, [*words, name, *out, *COMMANDS.get(command, [])], message)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder "whole", with a tokenizer, and a text."""
    monkeypatch.setattr(sys, "argv", ["hgrn2"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    torch.manual_seed(0)
    model = HGRN2ForCausalLM(
        HGRN2Config(vocab_size=257, hidden_size=16, num_hidden_layers=2, expand_ratio=8, intermediate_size=24)
    )
    model.save_pretrained("whole")
    ByteTokenizer().save(tmp_path / "whole")
    return model.eval()


def recipe(capsys, name):
    """The Python in the message of a command that was refused."""
    capsys.readouterr()
    assert cli.main(["generate", name]) == 2
    return re.search(r"after import hgrn2\.hf: (.*\('OUT'\))", capsys.readouterr().err)[1]


# of PEFT and transformers, in some versions of both
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning")
@torch.no_grad()
def test_an_adapter(here, capsys):
    base = transformers.AutoModelForCausalLM.from_pretrained("whole")
    tuned = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"))
    for name, x in tuned.named_parameters():
        if "lora_B" in name:
            x.normal_()
    tuned.save_pretrained("adapter")
    refused_everywhere(
        capsys, "adapter", "adapter: holds an adapter of PEFT, which is no model; merge it in Python",
        [*COMMANDS, "info", "train --resume"],
    )  # fmt: skip
    # beside the weights it would be passed over
    shutil.copytree("whole", "both")
    shutil.copy("adapter/adapter_config.json", "both")
    refused_everywhere(capsys, "both", "both: holds an adapter of PEFT")
    exec(recipe(capsys, "adapter"), {"peft": peft, "transformers": transformers})
    ids = torch.arange(9)[None]
    own = open_folder(Path("OUT")).load(torch.device("cpu"))
    torch.testing.assert_close(own(ids)[0], tuned.eval()(ids).logits)
    assert not torch.allclose(own(ids)[0], here(ids).logits)
    settings = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    assert "AutoModelForCausalLM.from_pretrained('BASE')" in recipe(capsys, "adapter")


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_other_heads(tied, here, capsys):
    config = HGRN2Config(**here.config.model_config.to_dict() | {"tie_word_embeddings": tied})
    model = HGRN2ForCausalLM(config).eval()
    model.model.save_pretrained("base")
    HGRN2ForSequenceClassification(config).save_pretrained("classifier")
    refused_everywhere(
        capsys, "base", "base: holds a model without a head, as AutoModel(...).save_pretrained writes it"
    )
    refused_everywhere(capsys, "classifier", "classifier: holds a classifier; wanted a language model")
    # what it costs follows from config.json alone
    assert "2 layers" in run_cli(capsys, "info", "base")
    exec(recipe(capsys, "base"), {"transformers": transformers})
    opened = open_folder(Path("OUT"))
    body = [name for name in opened.names if name.startswith("model.")]
    assert len(opened.names) - len(body) == (not tied)
    assert all(torch.equal(opened.read(name), model.state_dict()[name]) for name in body)


def test_a_transformer_without_a_head(here, capsys):
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.LlamaModel(config).save_pretrained("llama")
    refused_everywhere(capsys, "llama", "llama: holds a model without a head")


@pytest.mark.parametrize("form", [dict, merged])
def test_a_model_of_fla_s_without_a_head(form, here, capsys):
    tensors = {name.removeprefix("model."): x for name, x in form(draw(fla_shapes())).items()}
    head = tensors.pop("lm_head.weight")
    write(Path("base"), FLA_CONFIG, tensors)
    refused_everywhere(capsys, "base", "base: holds a model without a head")
    # whatever else is wrong is listed
    write(Path("more"), FLA_CONFIG, tensors | {"score.weight": head})
    refused_everywhere(capsys, "more", " missing: model.")


@pytest.mark.parametrize("name", ["model.Q4_K.gguf", "blob", "folder"])
def test_gguf_files(name, here, capsys):
    if name == "folder":
        os.mkdir(name)
    file = "folder/model.Q4_K.gguf" if name == "folder" else name
    with open(file, "wb") as out:
        out.write(b"GGUF\3\0\0\0\xff\xfe")
    place, found = ("folder", file.removeprefix("folder/")) if name == "folder" else (".", name)
    message = f"{name}: {'holds' if name == 'folder' else 'is'} a GGUF file, which is not read; write a folder of it"
    commands = [*COMMANDS, "info", "train --resume", "train --device cpu --data text.txt --model"]
    refused_everywhere(capsys, name, message, commands)
    refused_everywhere(capsys, name, f"from_pretrained({place!r}, gguf_file={found!r}, quantization_config=", commands)


def test_a_gguf_file_beside_a_model_is_passed_over(here, capsys):
    write(Path("model"), FLA_CONFIG, draw(fla_shapes()))
    for folder in ("model", "run"):
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/export.gguf", "wb") as out:
            out.write(b"GGUF\3\0\0\0")
    with open("run/config.json", "w") as out:
        out.write("{}")
    assert cli.main(["info", "model"]) == 0
    check_is_model(Path("model"))
    # as a run is told
    check_is_model(Path("run"))


def test_a_gguf_file_as_a_tokenizer(here, capsys):
    with open("model.gguf", "wb") as out:
        out.write(b"GGUF\3\0\0\0\xff\xfe")
    words = ["train", "--device", "cpu", "--data", "text.txt", "--tokenizer", "model.gguf"]
    refused(capsys, words, "is a GGUF file; write a folder of it in Python, by transformers: AutoTokenizer.from_pret")
