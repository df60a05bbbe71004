from __future__ import annotations

import errno
import json
import os
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgrn2.data import ByteTokenizer, HFTokenizer, TextStream, load_tokenizer, train_bpe
from hgrn2.data.find_tokenizer import bpe_request
from tests.refusals import refuses

TEXTS = ["the quick brown fox, the quick dog\n" * 5, "naïve 模型 🙂 the end\n" * 3]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 280)


@pytest.fixture(scope="module")
def metaspace():
    """A tokenizer whose tokens are words with a mark for the space, and bytes where it knows no word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {"</s>": 0, "<unk>": 1, "▁hello": 2, "▁world": 3}
    vocab |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    merges: list[tuple[str, str]] = []
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return HFTokenizer(backend, "metaspace")


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode([tokenizer.eot_id, *ids, tokenizer.eot_id]) == text


@given(text=st.text())
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids, errors="strict") == text
    assert b"".join(bpe.token_bytes(i) for i in ids) == text.encode()


@given(text=st.text(), use_bpe=st.booleans())
def test_stream_gives_the_text_and_only_whole_characters(bpe, text, use_bpe):
    tokenizer = bpe if use_bpe else ByteTokenizer()
    stream = TextStream(tokenizer)
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) + stream.flush() == text
    # a part holds U+FFFD only if the text does
    assert "\ufffd" in text or not any("\ufffd" in part for part in parts)


def test_stream_replaces_what_is_no_utf8():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(i) for i in (0xC3, 0x41, 0xFF, 256, 9999)] == ["", "\ufffdA", "\ufffd", "", "\ufffd"]
    assert stream.push(0xE2) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(0x41) == "A"


def test_stream_of_tokens_without_bytes_of_their_own(metaspace):
    assert metaspace.token_bytes(2) is None
    stream = TextStream(metaspace)
    euro = [4 + byte for byte in "€".encode()]
    # bytes in a row are decoded together: one more that does not belong there would change them all
    assert [stream.push(i) for i in [2, 3, *euro]] == ["hello", " world", "", "", ""]
    assert stream.peek() == "€"
    assert stream.push(2) == "€ hello"
    assert stream.push(euro[0]) == ""
    assert stream.flush() == "\ufffd"


def test_training_is_deterministic(bpe):
    again = train_bpe(iter(TEXTS), 280)
    assert again.backend.to_str() == bpe.backend.to_str()
    assert again.fingerprint() == bpe.fingerprint() != train_bpe(TEXTS, 270).fingerprint()
    assert bpe.vocab_size == 280
    assert bpe.token_bytes(bpe.eot_id) == b""


def test_small_corpus_gives_fewer_tokens():
    assert train_bpe(["ab"], 1000).vocab_size == 258


def test_training_refuses_less_than_the_bytes():
    with refuses("invalid-value", 256, 257):
        train_bpe(TEXTS, 256)


def test_control_tokens_in_a_text_are_plain_characters(bpe):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.eot_id not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"
    assert pickle.loads(pickle.dumps(bpe)).encode("a<|endoftext|>b") == ids


def test_truncation_padding_and_template_of_the_file_are_off(bpe):
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_str(bpe.backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bpe.eot_id)]
    )
    assert HFTokenizer.from_json(backend.to_str()).encode(TEXTS[0]) == bpe.encode(TEXTS[0])


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_save_and_load(tmp_path, bpe, name):
    tokenizer = bpe if name == "bpe" else ByteTokenizer()
    path = tokenizer.save(tmp_path)
    for spec in (tmp_path, path, str(path)):
        loaded = load_tokenizer(spec)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
        assert (loaded.vocab_size, loaded.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)


def test_end_of_text_names_in_order(bpe):
    data = json.loads(bpe.backend.to_str())
    data["added_tokens"][0]["content"] = "<eos>"
    data["model"]["vocab"] = {"<eos>" if k == "<|endoftext|>" else k: v for k, v in data["model"]["vocab"].items()}
    tokenizer = HFTokenizer.from_json(json.dumps(data))
    assert tokenizer.eot_id == 0
    tokenizer.backend.add_special_tokens(["</s>"])
    assert HFTokenizer(tokenizer.backend).eot_id == tokenizer.backend.token_to_id("</s>") == 280


def test_decode_of_ids_outside_the_vocabulary(bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = [*tokenizer.encode("a"), 5000]
        assert tokenizer.decode(ids) == "a\ufffd"
        assert tokenizer.decode(ids, errors="ignore") == "a"
        with pytest.raises(ValueError, match="5000 is outside"):
            tokenizer.decode(ids, errors="strict")


def test_vocabulary_larger_than_the_models(bpe):
    bpe.check_fits(280)
    with refuses("mismatch", 280, 279):
        bpe.check_fits(279)


def test_requests():
    assert bpe_request("bpe:4096") == 4096
    assert bpe_request("bytes") is None
    assert bpe_request(ByteTokenizer()) is None


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{", "unreadable"),
        ("{}", "unreadable"),
        (None, "not-found"),
    ],
)
def test_bad_files(tmp_path, content, code):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with refuses(code, path):
        load_tokenizer(path)


def test_no_end_of_text(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    with refuses("unsupported", "<|endoftext|>"):
        load_tokenizer(tmp_path)


def test_directories_without_a_tokenizer(tmp_path):
    with refuses("not-found", tmp_path, "tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    for spec in (tmp_path, tmp_path / "tokenizer.model"):
        with refuses("unsupported", "tokenizer.model", "save_pretrained"):
            load_tokenizer(spec)


def test_hub_name_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refuses("unavailable", "nobody/nothing"):
        load_tokenizer("nobody/nothing")


def test_hub_name_online(monkeypatch, tmp_path, bpe):
    path = bpe.save(tmp_path)
    monkeypatch.setattr("hgrn2.data.find_tokenizer.hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, local_files_only: str(path))
    loaded = load_tokenizer("somebody/something")
    assert loaded.name == "somebody/something"
    assert loaded.fingerprint() == bpe.fingerprint()


@pytest.mark.parametrize("size", [2**24 + 1, 99_999_999_999, 10**30])
def test_a_vocabulary_that_no_library_trains(size):
    with refuses("invalid-value", size, 16777216):
        train_bpe(["text"], size)
    with refuses("invalid-value", 16777216):
        bpe_request("bpe:" + "9" * 5000)


@pytest.mark.parametrize("spec", ["", "a\0b"])
def test_what_names_nothing(spec):
    with refuses("invalid-value", repr(spec)):
        load_tokenizer(spec)


def test_a_request_cannot_be_loaded():
    with refuses("unsupported", "bpe:4096"):
        load_tokenizer("bpe:4096")


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_full_disk_leaves_the_old_file(tmp_path, bpe, monkeypatch, name):
    tokenizer = ByteTokenizer() if name == "bytes" else bpe
    path = tokenizer.save(tmp_path)
    before = path.read_bytes()

    def fsync(handle):
        # by now what was written has reached some file
        assert path.read_bytes() == before
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(tmp_path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_vocabulary_without_an_unknown_token_refuses_what_it_lacks():
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    tokenizer = HFTokenizer(backend)
    assert tokenizer.encode("a a") == [1, 1]
    with refuses("unsupported", "UNK"):
        tokenizer.encode("a river")
