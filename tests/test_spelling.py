"""A continuation is spelt as in the whole text with every tokenizer; state files keep that."""

# pyright: reportArgumentType=false

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hgrn2.data import ByteTokenizer, HFTokenizer, TextStream
from hgrn2.errors import UserError
from hgrn2.inference.writing import Sampling, Writer, space_warning
from hgrn2.models import HGRN2LM, HGRN2Config
from tests.data import families
from tests.refusals import refuses

WORDS = ["a river", "rivers", " ", "  ", "\n", "模型", "the", " dog", ". ", "it's", "é", "\t", "🙂", "12345", "</s>"]


def make_model(vocab_size, seed=0, **changes):
    torch.manual_seed(seed)
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "expand_ratio": 8, "intermediate_size": 16}
    return HGRN2LM(
        HGRN2Config.from_dict({"vocab_size": vocab_size, "initializer_range": 1.0} | settings | changes)
    ).eval()


def written(writer, prompt, max_tokens, **settings):
    return "".join(writer.write(prompt, max_tokens, **settings))


def test_the_space_before_the_first_word():
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "▁a": 2, "▁river": 3}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["</s>", "<unk>"])
    tokenizer = HFTokenizer(backend)
    assert TextStream(tokenizer, [1, 2]).push(3) == " river"
    assert TextStream(tokenizer, [1]).push(3) == "river" == TextStream(tokenizer).push(3)


class AlwaysRiver(HGRN2LM):
    """Says token 3, whatever it reads."""

    def hidden_states(self, ids, state=None, **options):
        x, state = super().hidden_states(ids, state, **options)
        with torch.no_grad():
            self.lm_head.weight.zero_()
            self.lm_head.weight[3] = x[0, -1]
        return x, state


@pytest.mark.parametrize("kind", ["an unknown token", "no token"])
def test_the_space_after_words_that_the_vocabulary_lacks(kind, tmp_path):
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "▁river": 3}
    has_unknown = kind == "an unknown token"
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>") if has_unknown else models.BPE(vocab, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(["</s>", "<unk>"])
    tokenizer = HFTokenizer(backend)
    assert tokenizer.encode("zz") == ([0] if has_unknown else [])
    model = AlwaysRiver(HGRN2Config(vocab_size=4, hidden_size=8, expand_ratio=8, num_hidden_layers=1)).eval()

    def writer():
        return Writer(model, tokenizer, Sampling(temperature=0))

    assert written(writer(), "zz", 3) == " river river river"
    assert written(writer(), "zz", 3, stop=[" river r"]) == ""
    assert written(writer(), "", 3) == "river river river"
    if has_unknown:
        first, second = writer(), writer()
        assert written(first, "zz", 0) == ""
        first.save_state(tmp_path / "state")
        second.load_state(tmp_path / "state")
        assert written(second, "", 2) == " river river"


@pytest.mark.parametrize("name", families.MAKERS)
def test_a_stream_gives_the_text_of_the_whole(name):
    tokenizer, draws = families.make(name), random.Random(0)
    for _ in range(60):
        before = tokenizer.encode("".join(draws.choices(WORDS, k=draws.randrange(6))))
        ids = before + tokenizer.encode("".join(draws.choices(WORDS, k=8)))
        stream = TextStream(tokenizer, before)
        text = "".join(map(stream.push, ids[len(before) :])) + stream.flush()
        assert tokenizer.decode(before) + text == tokenizer.decode(ids)
        # of tokens in any order, with characters that are none
        ids = [draws.randrange(tokenizer.vocab_size) for _ in range(20)]
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", families.MAKERS)
def test_what_is_written_is_what_the_whole_says(name):
    tokenizer = families.make(name)
    model = make_model(tokenizer.vocab_size)
    prompt = "The quick river"
    writer = Writer(model, tokenizer, Sampling(temperature=0))
    text = written(writer, prompt, 12)
    ids = [*tokenizer.start_ids, *tokenizer.encode(prompt)]
    start = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0][0, -1, : tokenizer.vocab_size].argmax()))
            if ids[-1] in tokenizer.end_ids:
                break
    assert text == tokenizer.decode(ids)[len(tokenizer.decode(ids[:start])) :]
    if len(text) > 4:
        assert (
            written(Writer(model, tokenizer, Sampling(temperature=0)), prompt, 12, stop=(text[3:5],))
            == (text[: text.index(text[3:5])])
        )


@pytest.mark.parametrize("name", families.MAKERS)
def test_a_prompt_after_a_text_goes_on_with_it(name):
    tokenizer = families.make(name)
    for before, text in [("The quick river", " and a dog"), ("The quick river", "\nand a dog"), ("a b.", "and a dog")]:
        ids = tokenizer.encode(before)
        whole = tokenizer.decode([*ids, *tokenizer.continue_text(text, tokenizer.decode(ids))])
        # nothing stands between them that stands in neither
        assert whole.replace(" ", "") == tokenizer.decode(tokenizer.encode(before + text)).replace(" ", "")
        if name not in ("wordpiece", "wordlevel", "t5"):
            assert whole == tokenizer.decode(tokenizer.encode(before + text))


def test_a_state_keeps_the_space_before_the_next_word(tmp_path):
    tokenizer = families.make("llama")
    model = make_model(tokenizer.vocab_size)
    uninterrupted = written(Writer(model, tokenizer, Sampling(temperature=0)), "a river", 20)
    for cut in range(1, 20):
        first = Writer(model, tokenizer, Sampling(temperature=0))
        head = written(first, "a river", cut)
        first.save_state(tmp_path / "state")
        second = Writer(model, tokenizer, Sampling(temperature=0))
        second.load_state(tmp_path / "state")
        tail = written(second, "", 20 - cut)
        if "\ufffd" not in head:
            assert head + tail == uninterrupted
    assert " " in uninterrupted


def test_how_the_writing_ended():
    tokenizer = ByteTokenizer()
    model = make_model(257)
    writer = Writer(model, tokenizer, Sampling(temperature=0))
    text = written(writer, "ab", 5)
    assert (writer.num_written, writer.ended_by) == (5, "length")
    written(Writer(model, tokenizer, Sampling(temperature=0)), "ab", 5, stop=(text[:1],))
    tokenizer.end_ids = frozenset(range(257))
    assert written(writer, "", 5) == ""
    assert (writer.num_written, writer.ended_by) == (1, "end-of-text")


# state files


@pytest.fixture
def saved(tmp_path):
    model, path = make_model(257, attn={"layers": [0], "num_heads": 2}), tmp_path / "state"
    writer = Writer(model, ByteTokenizer(), Sampling(temperature=0))
    list(writer.write("abc", 3))
    writer.save_state(path)
    return model, path


def test_a_state_file_with_a_flipped_bit_is_refused(saved):
    model, path = saved
    data = path.read_bytes()
    draws = random.Random(0)
    before = {name: x.clone() for name, x in load_file(path).items()}
    messages = []
    for _ in range(150):
        bit = draws.randrange(len(data) * 8)
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        writer = Writer(model, ByteTokenizer(), Sampling(temperature=0))
        try:
            writer.load_state(path)
        except UserError as error:
            messages.append(str(error))
        else:
            # a bit that says nothing, such as padding
            assert all(torch.equal(x, before[name]) for name, x in writer.state.tensors().items())
    assert len(messages) > 140
    assert all(str(path) in message and "\n" not in message for message in messages)
    path.write_bytes(data)
    Writer(model, ByteTokenizer(), Sampling(temperature=0)).load_state(path)


def old_file(path, tensors=None, **about):
    with safe_open(path, "pt") as file:
        kept = json.loads(file.metadata()["hgrn2"]) | {"format": "hgrn2-state-2"}
    save_file(load_file(path) | (tensors or {}), path, {"hgrn2": json.dumps(kept | about)})


def test_state_files_of_earlier_versions_open(saved):
    model, path = saved
    writer = Writer(model, ByteTokenizer(), Sampling(temperature=0))
    writer.load_state(path)
    wanted = written(writer, "", 5)
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["hgrn2"])
    del about["recent"]
    save_file(load_file(path), path, {"hgrn2": json.dumps(about | {"format": "hgrn2-state-2"})})
    writer = Writer(model, ByteTokenizer(), Sampling(temperature=0))
    writer.load_state(path)
    assert written(writer, "", 5) == wanted


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        ({}, {"pending": [257]}),
        ({}, {"pending": [-1]}),
        ({}, {"pending": [1.5]}),
        ({}, {"pending": [True]}),
        ({}, {"pending": "abc"}),
        ({}, {"pending": {"1": 2}}),
        ({}, {"recent": [10**30]}),
        ({}, {"recent": None}),
        ({"generator": torch.zeros(5056, dtype=torch.uint8)}, {}),
        ({"generator": torch.full((5056,), 255, dtype=torch.uint8)}, {}),
        ({"generator": torch.zeros(5056)}, {}),
        ({"generator": torch.cat([torch.Generator().get_state()[:24], torch.zeros(5032, dtype=torch.uint8)])}, {}),
        ({"seen": torch.zeros(1, 257)}, {}),
        ({"layers.0.key": torch.full((1, 7, 2, 8), torch.nan)}, {}),
        ({"layers.0.valid": torch.zeros(())}, {}),
        ({"layers.9.recurrent": torch.zeros(1)}, {}),
        ({"layers.0.a.b": torch.zeros(1)}, {}),
    ],
)
def test_crafted_state_files(saved, tensors, about):
    model, path = saved
    old_file(path, tensors, **about)
    if "layers.0.key" in tensors:
        code = "not-finite"
    elif "layers.0.valid" in tensors:
        code = "mismatch"
    else:
        code = "damaged"
    with refuses(code, path) as caught:
        Writer(model, ByteTokenizer(), Sampling(temperature=1)).load_state(path)
    assert "\n" not in str(caught.value)


def test_metadata_that_is_nested_too_deep(saved):
    model, path = saved
    save_file(load_file(path), path, {"hgrn2": "[" * 200_000})
    with refuses("unreadable", path):
        Writer(model, ByteTokenizer(), Sampling()).load_state(path)


@pytest.mark.parametrize(
    ("name", "prompt", "warned"),
    [
        ("gpt2", "def ", True),
        ("gpt2", "def", False),
        ("gpt2", "def\n", False),
        ("gpt2", " ", False),
        ("llama", "a river ", True),
        ("cl100k", "a river  ", True),
        # its spaces are no tokens
        ("wordpiece", "a river ", False),
    ],
)
def test_a_space_at_the_end_of_a_prompt(name, prompt, warned):
    assert (space_warning(families.make(name), prompt) is not None) == warned
    assert space_warning(ByteTokenizer(), prompt) is None
