from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgrn2.data.tokens import TokenDataset, token_dtype
from tests.refusals import refuses

DOCUMENTS = ["hello", "naïve", "a longer document\n" * 3, "x"]


def expected(documents):
    return np.concatenate([np.array([256, *document.encode()]) for document in documents])


@pytest.mark.parametrize("shard_tokens", [1, 7, 1000])
def test_stream_and_counts(make_dataset, shard_tokens):
    dataset = make_dataset(DOCUMENTS, shard_tokens)
    tokens = dataset.tokens(0, dataset.num_tokens)
    assert tokens.dtype == np.int64
    assert np.array_equal(tokens, expected(DOCUMENTS))
    assert (dataset.num_documents, dataset.num_text_bytes) == (4, sum(len(d.encode()) for d in DOCUMENTS))
    assert np.array_equal(dataset.document_starts, np.flatnonzero(tokens == dataset.eot_id))
    assert len(dataset) == dataset.num_tokens == sum(s["num_tokens"] for s in dataset.manifest["shards"])


@given(data=st.data(), shard_tokens=st.sampled_from([1, 3, 16, 10_000]))
def test_any_range(make_dataset, data, shard_tokens):
    dataset = make_dataset(DOCUMENTS, shard_tokens)
    start = data.draw(st.integers(0, dataset.num_tokens))
    stop = data.draw(st.integers(start, dataset.num_tokens))
    assert np.array_equal(dataset.tokens(start, stop), expected(DOCUMENTS)[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 10_000), (10_000, 10_001)])
def test_ranges_outside(make_dataset, start, stop):
    dataset = make_dataset(DOCUMENTS)
    with pytest.raises(IndexError):
        dataset.tokens(start, stop)


def test_text_bytes_at_piece_ends(make_dataset):
    dataset = make_dataset([["abc", "déf"], "gh"])
    assert dataset.piece_ends.tolist() == [4, 8, 11]
    assert dataset.piece_bytes.tolist() == [3, 7, 9]
    assert dataset.text_bytes(0, 11) == 9
    assert dataset.text_bytes(4, 8) == 4
    assert dataset.text_bytes(8, 11) == 2
    for position in (5, 12):
        with pytest.raises(ValueError, match=f"position {position} is not the end"):
            dataset.text_bytes(0, position)


def test_dtype_follows_the_vocabulary():
    assert token_dtype(65_536) == np.dtype("<u2")
    assert token_dtype(65_537) == np.dtype("<u4")


def test_large_vocabulary(tmp_path):
    from hgrn2.data.encode import EncodedPiece
    from hgrn2.data.tokenizer import ByteTokenizer
    from hgrn2.data.writer import TokenWriter

    tokenizer = ByteTokenizer()
    tokenizer.vocab_size, tokenizer.eot_id = 100_000, 99_999
    writer = TokenWriter(tmp_path / "set", tokenizer)
    writer.add(EncodedPiece(np.array([70_000], dtype="<u4"), 1), starts_document=True)
    writer.close()
    assert TokenDataset.open(tmp_path / "set").tokens(0, 2).tolist() == [99_999, 70_000]


def test_fingerprint_follows_tokens(make_dataset):
    one, same, other = make_dataset(DOCUMENTS), make_dataset(DOCUMENTS), make_dataset(DOCUMENTS[1:])
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin", "pieces.bin"])
def test_truncated_files(make_dataset, name):
    directory = make_dataset(DOCUMENTS, 30).directory
    path = directory / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-2])
    for verify in (None, True, False):
        with refuses("damaged", name, size - 2, size):
            TokenDataset.open(directory, verify)


def test_missing_file(make_dataset):
    directory = make_dataset(DOCUMENTS, 30).directory
    (directory / "tokens-00000.bin").unlink()
    with refuses("unreadable", "tokens-00000.bin"):
        TokenDataset.open(directory)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin", "pieces.bin"])
def test_changed_files(make_dataset, name):
    directory = make_dataset(DOCUMENTS, 30).directory
    path = directory / name
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    for verify in (None, True):
        with refuses("damaged", name, "sha256"):
            TokenDataset.open(directory, verify)
    # sizes, and the ends of the index files, are all that is looked at then
    if name != "pieces.bin":
        assert TokenDataset.open(directory, verify=False).num_documents == 4


def test_large_sets_are_checked_by_size_unless_asked(make_dataset, monkeypatch):
    directory = make_dataset(DOCUMENTS, 30).directory
    path = directory / "tokens-00001.bin"
    path.write_bytes(b"xx" + path.read_bytes()[2:])
    monkeypatch.setattr("hgrn2.data.tokens.VERIFY_BELOW_BYTES", 100)
    assert TokenDataset.open(directory).num_documents == 4
    with refuses("damaged", path.name):
        TokenDataset.open(directory, verify=True)


@pytest.mark.parametrize(
    ("edit", "code", "names"),
    [
        (lambda m: m.update(format="other"), "unreadable", ["hgrn2-tokens"]),
        (lambda m: m.update(version=99), "version", [99, 1]),
        (lambda m: m.pop("num_tokens"), "damaged", ["'num_tokens'"]),
        (lambda m: m.update(shards=[{}]), "damaged", ["shard 0", "None"]),
        (lambda m: m.update(shards=3), "damaged", ["'shards'"]),
        (lambda m: m.update(eot_id=0), "damaged", ["eot_id is 0"]),
        (lambda m: m.update(eot_id=257), "damaged", ["eot_id is 257"]),
        (lambda m: m.update(dtype="uint8"), "damaged", ["'uint8'", "'uint16'"]),
        (lambda m: m.update(dtype="object"), "damaged", ["'object'", "'uint16'"]),
        (lambda m: m.update(num_tokens=2**50), "damaged", ["num_tokens = 1,125,899,906,842,624"]),
        (lambda m: m.update(num_tokens="x"), "damaged", ["'num_tokens'"]),
        (lambda m: m.update(num_tokens=True), "damaged", ["'num_tokens'"]),
        (lambda m: m.update(shard_tokens=0), "damaged", ["'shard_tokens'"]),
        (lambda m: m.update(num_documents=3), "damaged", ["documents.bin", "num_documents = 3"]),
        (lambda m: m.update(num_text_bytes=7), "damaged", ["num_text_bytes", "pieces.bin"]),
        (lambda m: m.update(vocab_size=10**30), "damaged", ["'vocab_size'"]),
        (lambda m: m.update(num_tokens_=1), "damaged", ["'num_tokens_'", "'num_tokens'"]),
        (
            lambda m: m["shards"][0].update(file="/etc/passwd"),
            "damaged",
            ["'/etc/passwd'"],
        ),
        (lambda m: m["shards"][0].update(file="../x"), "damaged", ["'../x'"]),
        (lambda m: m["documents"].update(file="tokens-00000.bin"), "damaged", ["named more than once"]),
        (lambda m: m["documents"].update(num_bytes=[]), "damaged", ["documents", "'num_bytes'"]),
    ],
)
def test_bad_manifests(make_dataset, edit, code, names):
    directory = make_dataset(DOCUMENTS).directory
    manifest = json.loads((directory / "manifest.json").read_text())
    # as older sets have it
    del manifest["hgrn2_digest"]
    edit(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with refuses(code, directory, *names):
        TokenDataset.open(directory)


def test_unreadable_manifests(make_dataset, tmp_path):
    with refuses("not-found", "manifest.json"):
        TokenDataset.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "hg')
    with refuses("unreadable", "manifest.json"):
        TokenDataset.open(tmp_path)
    (tmp_path / "manifest.json").write_text("[" * 200_000)
    with refuses("unreadable", "manifest.json"):
        TokenDataset.open(tmp_path)


@pytest.mark.parametrize("key", ["eot_id", "vocab_size", "tokenizer", "shard_tokens"])
def test_a_digest_tells_of_any_change(make_dataset, key):
    path = make_dataset(DOCUMENTS).directory / "manifest.json"
    manifest = json.loads(path.read_text())
    # in another layout it is still the same
    path.write_text(json.dumps(dict(reversed(manifest.items()))))
    TokenDataset.open(path.parent)
    manifest[key] = "other" if key == "tokenizer" else manifest[key] - 1
    path.write_text(json.dumps(manifest))
    with refuses("damaged", path, "hgrn2_digest"):
        TokenDataset.open(path.parent)


def test_a_shard_cut_short_while_it_is_read(make_dataset):
    dataset = make_dataset(DOCUMENTS, 30)
    path = dataset.directory / "tokens-00001.bin"
    os.truncate(path, 10)
    with refuses("damaged", "tokens-00001.bin"):
        dataset.tokens(0, dataset.num_tokens)
