"""Damaged and hostile rows end in one line that names file and row, whatever the library that reads them says."""

import bz2
import gzip
import json
import lzma
import random

import pytest

from hgrn2.data import open_corpus, prepare
from hgrn2.errors import UserError
from tests.refusals import refuses


def read(path, field="text"):
    return [(document.name, "".join(document.pieces)) for document in open_corpus(path, field).documents()]


@pytest.mark.parametrize(
    ("line", "code", "names"),
    [
        (b'{"text":"half \xed\xa0\xbd"}', "unreadable", ["0xed", "offset 14"]),
        (b'{"text":"half \\ud83d"}', "unreadable", ["surrogate"]),
        (b'{"\xed\xa0\xbd":"x"}', "unreadable", ["UTF-8"]),
        (b'{"te\\ud83d":"x"}', "not-found", ["'text'"]),
        (b'{"text":"\xff"}', "unreadable", ["0xff"]),
        (b"[" * 100_000, "unreadable", ["nested too deep"]),
        (b'{"text":' + b"[" * 100_000, "unreadable", ["nested too deep"]),
        (b'{"text":"a","n":' + b"9" * 6000 + b"}", "unreadable", ["digits"]),
        (b'{"text":"a\\u0000"}', "unreadable", ["NUL", "character 1"]),
        (b'{"text":NaN}', "unreadable", ["'text'", "float"]),
        (b'"x"', "unreadable", ["str", "'text'"]),
        (b"\0\0", "unreadable", ["JSON"]),
    ],
)
def test_lines_that_are_no_documents(tmp_path, line, code, names):
    path = tmp_path / "s.jsonl"
    path.write_bytes(b'{"text":"fine"}\n' + line + b"\n")
    for use in (read, lambda path: prepare(path, "bytes", tmp_path / "out")):
        with refuses(code, f"{path}, line 2: ", *names) as caught:
            use(path)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()
    assert [p.name for p in tmp_path.iterdir()] == ["s.jsonl"]


def test_parquet_columns_of_other_kinds(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0")
    bad = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ab\xff")])
    for column, names in [
        (bad, ["row 2", "0xff", "offset 0"]),
        (pa.array([b"ab"]), ["row 1", "'text'", "bytes"]),
        (pa.array([["ab"]]), ["row 1", "'text'", "list"]),
        (pa.array(["fine", "a\0"]), ["row 2", "NUL"]),
    ]:
        parquet.write_table(pa.table({"text": column}), path)
        with refuses("unreadable", path, *names):
            read(path)
    parquet.write_table(pa.table({"text": pa.array(["a", None, "b"]).dictionary_encode()}), path)
    assert read(path) == [("a.parquet#1", "a"), ("a.parquet#3", "b")]


def test_damaged_parquet_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path, draws = tmp_path / "a.parquet", random.Random(0)
    texts = [f"a text {i} é 模型" for i in range(200)]
    table = pa.table({"text": texts})
    for compression in ("none", "zstd"):
        parquet.write_table(table, path, compression=compression, write_page_checksum=True)
        data = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(data)
            damaged[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
            path.write_bytes(damaged)
            try:
                found = [text for _, text in read(path)]
            except UserError as error:
                message = str(error)
            else:
                # a bit of what nobody reads, or of the statistics
                assert found == texts
                continue
            assert str(path) in message
            assert "\n" not in message


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
def test_damaged_compressed_lines(tmp_path, suffix):
    lines = "".join(json.dumps({"text": f"a text {i} é"}) + "\n" for i in range(200)).encode()
    if suffix == ".zst":
        compress = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress
    else:
        compress = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix]
    data, path, draws = compress(lines), tmp_path / f"a.jsonl{suffix}", random.Random(0)
    refused = 0
    for _ in range(40):
        damaged = bytearray(data)
        damaged[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read(path)
        except UserError as error:
            refused += 1
            message = str(error)
        else:
            assert len(found) == 200
            continue
        assert str(path) in message
        assert "\n" not in message
    assert refused > 30
