"""Pieces of a document give the tokens of the whole, whatever the tokenizer."""

import itertools
import json
import random

import pytest

from hgrn2.data import ByteTokenizer, HFTokenizer, prepare
from hgrn2.data import pieces as pieces_module
from hgrn2.data.documents import Document
from hgrn2.data.pieces import cut_document, keeps_text, piece_tokens
from hgrn2.inference.scoring import score
from hgrn2.models import HGRN2LM, HGRN2Config
from tests.data import families
from tests.refusals import refuses

WORDS = [
    "a river", "rivers", " ", "  ", "\n", "\n\n", "模型", "the", " dog", ". ", "it's", "é", "\t", "🙂", "12345", "</s>",
    "//x", "/", "\n/", "\r\n", "...", "   ", "\n    ", "e\u0301", ");\n//", " \n", "Σ", "<|endoftext|>",
    "aaaaaaaa", "1" * 30,
]  # fmt: skip


def tokens_in_pieces(tokenizer, blocks, piece_chars):
    pieces = list(cut_document(tokenizer, blocks, piece_chars))
    assert "".join(piece.text for piece in pieces) == "".join(blocks)
    assert all(piece.text for piece in pieces)
    return [i for ids in piece_tokens(tokenizer, pieces) for i in ids.tolist()], len(pieces)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.MAKERS)
def test_pieces_of_any_size_give_the_tokens_of_the_whole(name):
    tokenizer, draws = families.make(name), random.Random(name)
    most = 0
    for _ in range(12):
        text = "".join(draws.choices(WORDS, k=draws.randrange(100, 1200)))
        cut = draws.randrange(len(text))
        found, num_pieces = tokens_in_pieces(tokenizer, [text[:cut], text[cut:]], draws.choice([40, 200, 600]))
        assert found == tokenizer.encode(text)
        most = max(most, num_pieces)
    assert most > 5


@pytest.mark.parametrize("name", families.MAKERS)
def test_a_long_document(name):
    tokenizer = families.make(name)
    text = " one river\ntwo" * 6000 + "\n" + "模型和语言。\n" * 900
    found, num_pieces = tokens_in_pieces(tokenizer, [text], 1 << 16)
    assert found == tokenizer.encode(text)
    assert num_pieces == 2


def test_a_prefix_space_belongs_to_the_start_of_a_document_alone():
    tokenizer = families.make("gpt2-prefix")
    text = " one\ntwo" * 9000
    pieces = piece_tokens(tokenizer, list(cut_document(tokenizer, [text])))
    assert (
        tokenizer.decode(i for ids in pieces for i in ids.tolist()) == text == tokenizer.decode(tokenizer.encode(text))
    )


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_without_a_place_to_cut_a_document_stays_whole_up_to_a_limit(name, monkeypatch):
    tokenizer = families.make(name)
    text = "river" * 2000
    found, num_pieces = tokens_in_pieces(tokenizer, [text], 1000)
    assert found == tokenizer.encode(text)
    assert num_pieces == 1
    monkeypatch.setattr(pieces_module, "WHOLE_CHARS", 8000)
    with refuses("unsupported", tokenizer.name, "8,000", "'bytes'") as caught:
        list(cut_document(tokenizer, [text], 1000))
    assert "\n" not in str(caught.value)
    assert len(list(cut_document(ByteTokenizer(), [text[:5000], text[5000:]], 1000))) == 2


def test_little_is_read_ahead():
    read = []

    def blocks():
        for _ in range(50):
            read.append(len(read))
            yield "a river and a dog\n" * 50

    pieces = cut_document(families.make("llama"), blocks(), 2000)
    next(pieces)
    assert len(read) <= 4


@pytest.mark.parametrize("name", ["unigram", "wordlevel", "llama", "gpt2", "llama3"])
def test_an_end_of_text_in_a_text_is_plain_characters(name):
    tokenizer = families.make(name)
    special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    for end in [*tokenizer.backend.get_added_tokens_decoder().values()]:
        ids = set(tokenizer.encode(f"a {end.content} b{end.content}"))
        # <unk> is what a vocabulary says of a word that it lacks
        assert not (special - {tokenizer.backend.token_to_id("<unk>")}) & ids


def test_an_end_of_text_among_the_words_of_a_model():
    from tokenizers import Tokenizer, models, pre_tokenizers

    chars = [(c, -5.0) for c in "▁ab</s>"]
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *chars], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    merged = Tokenizer(
        models.BPE({"a": 0, "b": 1, " ": 2, "<": 3, "/s>": 4, "</s>": 5}, [("<", "/s>")], ignore_merges=True)
    )
    merged.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    for backend, how in itertools.product((unigram, words, merged), ("special", "plain", "none")):
        copy = Tokenizer.from_str(backend.to_str())
        if how != "none":
            (copy.add_special_tokens if how == "special" else copy.add_tokens)(["</s>"])
        tokenizer = HFTokenizer(copy)
        assert tokenizer.eot_id not in tokenizer.encode("a </s> b")
        assert tokenizer.encode("a b") == backend.encode("a b").ids
        assert tokenizer.decode([tokenizer.eot_id]) == ""


# what a tokenizer loses


def model_for(tokenizer):
    settings = {"hidden_size": 8, "expand_ratio": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    return HGRN2LM(HGRN2Config.from_dict({"vocab_size": tokenizer.vocab_size} | settings)).eval()


@pytest.mark.parametrize(
    ("name", "text", "num_unknown", "kept"),
    [
        ("gpt2", "A river, 模型\n\n the <|endoftext|>", 0, True),
        ("gpt2-prefix", "a river", 0, True),
        ("qwen", "a café", 0, True),
        # a letter and its accent become one character
        ("qwen", "a cafe\u0301", 0, False),
        ("llama", "A river, 模型\n\n the  end", 0, True),
        ("gemma", " A river", 0, True),
        ("unigram", "a river", 0, True),
        ("unigram", "a 语Ж river", 1, False),
        ("t5", "two\nlines", 0, False),
        ("wordpiece", "The river", 0, False),
        ("wordlevel", "a xylophone", 1, False),
    ],
)
def test_bits_a_byte_only_of_what_the_tokens_keep(name, text, num_unknown, kept):
    tokenizer = families.make(name)
    found = score(model_for(tokenizer), tokenizer, Document("x", iter([text])))
    assert (found.num_unknown, found.keeps_text) == (num_unknown, kept)
    assert (found.bits_per_byte is not None) == kept
    assert (found.losses() is None) == kept
    if num_unknown:
        assert "1 token stands for text that the tokenizer does not know" in str(found.losses())
    assert found.to_dict()["bits_per_byte"] == found.bits_per_byte
    (piece,) = cut_document(tokenizer, [text])
    assert (keeps_text(tokenizer, piece, piece_tokens(tokenizer, [piece])[0]) and not num_unknown) == kept


def test_what_is_unknown_is_named():
    tokenizer = families.make("wordlevel")
    found = score(model_for(tokenizer), tokenizer, Document("x", iter(["a xylophone and a zither, a xylophone"])))
    assert found.unknown[0] == "xylophone"
    assert found.num_unknown >= 3
    assert "'xylophone'" in str(found.losses())


def test_a_prepared_set_knows_what_was_lost(tmp_path):
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"a river {i} xylophone\n" * (5 + 7000 * (i == 3)))
    files = sorted(tmp_path.glob("*.txt"))
    for name, kept in [("wordlevel", False), ("llama", True)]:
        prepared = prepare(files, families.make(name), tmp_path / name, num_workers=1, validation_fraction=0.4)
        assert prepared.validation.keeps_text == prepared.train.keeps_text == kept
        assert (prepared.train.num_unknown > 0) != kept
        assert ("bits per byte are not available" in prepared.summary()) != kept
        if name == "llama":
            # the long document was cut, and nobody sees it
            texts = set()
            for part in (prepared.train, prepared.validation):
                bounds = [*part.document_starts, part.num_tokens]
                texts |= {prepared.tokenizer.decode(part.tokens(*span)) for span in itertools.pairwise(bounds)}
            assert texts == {path.read_text() for path in files}


def test_merges_are_not_left_out_at_random():
    content = json.loads(families.make("gpt2").backend.to_str())
    content["model"]["dropout"] = 0.5
    tokenizer = HFTokenizer.from_json(json.dumps(content))
    assert tokenizer.encode("rivers and a river") == families.make("gpt2").encode("rivers and a river")
