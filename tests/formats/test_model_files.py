"""Facts about a model in its folder: several ends of a text, a chat template, the beginning of a text."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hgrn2 import cli
from hgrn2.data import HFTokenizer, load_tokenizer
from hgrn2.inference.writing import Sampling, Writer
from hgrn2.loading import load
from tests.data import families
from tests.refusals import refuses


def write_chat_model(folder, template="{{ messages[0]['content'] }}<|im_end|>"):
    """A Transformer with an end of text and an end of turn."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    torch.manual_seed(0)
    ids = {"bos_token_id": 256, "eos_token_id": [256, 257], "pad_token_id": 256}
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, **ids
        )
    ).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def write_notes(folder):
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"a small text, number {i}")


def test_every_end_of_a_text_ends_it(tmp_path):
    backend = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    ids = {"eos_token_id": [2, 3], "pad_token_id": 2, "bos_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=4, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1, **ids)
    )
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(4, 8))
        model.lm_head.weight.zero_()
        # a, the end of a turn, and b for ever
        for token, following in ((0, 3), (3, 1), (1, 1)):
            model.lm_head.weight[following, token] = 1
    model.save_pretrained(tmp_path)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    theirs.save_pretrained(tmp_path)
    assert model.generate(torch.tensor([[0]]), max_new_tokens=5, do_sample=False).tolist() == [[0, 3]]

    def write():
        return "".join(Writer(*load(tmp_path, "latest", "cpu"), Sampling(temperature=0)).write("a", 5))

    assert write() == ""
    # the tokenizer's settings alone say it as well, and generation_config.json before config.json
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").unlink()
    assert write() == ""
    (tmp_path / "tokenizer_config.json").unlink()
    assert write() == "bbbb"
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert write() == ""
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "three"}')
    with refuses("invalid-value", "generation_config.json", "eos_token_id", "'three'"):
        write()


@pytest.mark.slow
def test_a_chat_template_survives_training_and_conversion(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_chat_model("chat")
    write_notes(tmp_path / "notes")
    small = ["--batch-size", "1", "--seq-len", "8", "--device", "cpu"]
    assert cli.main(["convert", "--from-transformer", "chat", "start"]) == 0
    assert cli.main(["train", "--from", "start", "--data", "notes", *small, "--max-steps", "1", "--out", "runs/c"]) == 0
    assert cli.main(["train", "--resume", "runs/c", "--max-steps", "2"]) == 0
    assert cli.main(["convert", "runs/c", "back", "--to", "hf"]) == 0
    before, after = AutoTokenizer.from_pretrained("chat"), AutoTokenizer.from_pretrained("back")
    assert after.eos_token == "<|im_end|>"
    assert (after.bos_token, after.pad_token) == (before.bos_token, before.pad_token)
    messages = [{"role": "user", "content": "hello"}]
    assert after.apply_chat_template(messages, tokenize=False) == before.apply_chat_template(messages, tokenize=False)
    assert after("hello").input_ids == before("hello").input_ids
    for name in ("config.json", "generation_config.json"):
        found, wanted = (json.loads(Path(folder, name).read_text()) for folder in ("back", "chat"))
        assert found["eos_token_id"] == wanted["eos_token_id"] == [256, 257]
    # the run ends a text where its model does
    assert load_tokenizer("runs/c").end_ids == load_tokenizer("back").end_ids == {256, 257}
    # and a run from nothing with the same tokenizer has ends and a beginning of its own
    model = ["--set", "hidden_size=16", "expand_ratio=8", "num_hidden_layers=1", "intermediate_size=16"]
    args = ["--tokenizer", "chat", *small, "--max-steps", "1", "--out", "runs/n", *model]
    assert cli.main(["train", "--data", "notes", *args]) == 0
    assert not Path("runs/n/chat_template.jinja").exists()
    capsys.readouterr()


def test_a_text_begins_as_the_folder_says(tmp_path):
    """Llama's begin with <s>; the text is that of transformers."""
    made = families.make("llama").backend
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=made.get_vocab_size(), hidden_size=16, intermediate_size=16, num_attention_heads=2,
            num_hidden_layers=1, initializer_range=1.0, **ids,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).start_ids == (1,)
    prompts = ["a river", "The quick brown", "def f(x):\n    return", " one"]
    for prompt in prompts:
        inputs = theirs(prompt, return_tensors="pt")
        out = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=16, do_sample=False
        )
        writer = Writer(*load(tmp_path, "latest", "cpu"), Sampling(temperature=0))
        text = "".join(writer.write(prompt, 16))
        whole = theirs.decode(out[0], skip_special_tokens=True)
        assert prompt + text == whole


def test_an_end_of_text_of_another_name(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "[unk]": 1}, unk_token="[unk]"))
    backend.add_special_tokens(["<|return|>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    with refuses("unsupported", "tokenizer.json", "<|endoftext|>"):
        load_tokenizer(tmp_path)
    for eos in ("<|return|>", {"content": "<|return|>", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.eot_id == 2
        (tmp_path / "saved").mkdir(exist_ok=True)
        tokenizer.save(tmp_path / "saved")
        assert load_tokenizer(tmp_path / "saved").eot_id == 2
    for text in ("{", "[]", "[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_text(text)
        with refuses("unreadable", "tokenizer_config.json") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_template_may_put_tokens_before_and_after(tmp_path):
    backend = families.make("wordpiece").backend
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    # a tokenizer alone says nothing of a model
    assert load_tokenizer(tmp_path).start_ids == (4,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.start_ids == (2,)
    assert tokenizer.end_ids == {3, 4}
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.encode("a river") == families.make("wordpiece").encode("a river")
