from __future__ import annotations

import bz2
import gzip
import lzma
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hgrn2.data import text as text_module
from hgrn2.data import train_bpe
from hgrn2.data.text import cut_pieces, read_text
from tests.refusals import refuses


def compressed(suffix: str, data: bytes) -> bytes:
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        # two frames, as parallel compressors write them
        half = len(data) // 2
        compress = zstandard.ZstdCompressor().compress
        return compress(data[:half]) + compress(data[half:])
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[suffix](data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".bz2", ".zst"])
def test_reads_whatever_the_compression(tmp_path, monkeypatch, suffix):
    # a prime block size, so that characters straddle blocks
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 7)
    text = "naïve 模型 🙂\n" * 20
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compressed(suffix, text.encode()))
    assert "".join(read_text(path)) == text


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_compressed_files(tmp_path, suffix, damage):
    data = compressed(suffix, bytes(range(1, 128)) * 100)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: len(data) // 3] if damage == "cut" else b"garbage, no header" * 9)
    with refuses("damaged", path) as error:
        list(read_text(path))
    assert error.value.reason == "damaged"


@pytest.mark.parametrize(
    ("data", "names", "reason"),
    [
        (b"", [], "empty"),
        (b"abc\ndefgh\0i", ["NUL", "offset 9"], "binary"),
        (b"abcdefghij\xff", ["0xff", "offset 10"], "not UTF-8"),
        ("abcde模".encode()[:-1], ["0xe6", "offset 5"], "not UTF-8"),
        ("abcde模".encode()[:-1] + b"abcdefg", ["0xe6", "offset 5"], "not UTF-8"),
        ("\ufeffab".encode() + b"\xff", ["offset 5"], "not UTF-8"),
        ("text".encode("utf-16"), ["UTF-16"], "not UTF-8"),
    ],
)
def test_what_is_not_text(tmp_path, monkeypatch, data, names, reason):
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 7)
    path = tmp_path / "named.txt"
    path.write_bytes(data)
    with refuses("unreadable", path, *names) as error:
        list(read_text(path))
    assert error.value.reason == reason


def test_missing_file(tmp_path):
    with refuses("unreadable", tmp_path / "none.txt"):
        list(read_text(tmp_path / "none.txt"))


def test_byte_order_mark_is_dropped_and_line_ends_are_kept(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa\r\nb\rc\n".encode())
    assert "".join(read_text(path)) == "a\r\nb\rc\n"


@given(
    text=st.text(alphabet="ab \n\r\té", max_size=300),
    piece_chars=st.integers(2, 40),
    cuts=st.lists(st.integers(0, 300), max_size=6),
)
def test_pieces_do_not_depend_on_blocks(text, piece_chars, cuts):
    bounds = [0, *sorted(cuts), len(text)]
    blocks = [text[a:b] for a, b in pairwise(bounds)]
    pieces = list(cut_pieces(blocks, piece_chars))
    assert "".join(pieces) == text
    assert all(1 <= len(piece) <= piece_chars for piece in pieces)
    assert pieces == list(cut_pieces([text], piece_chars))


def test_pieces_end_at_line_ends_where_there_are_some():
    assert list(cut_pieces(["abcdef\nx\n\n  y\nz"], 11)) == ["abcdef\n", "x\n\n  y\nz"]
    assert list(cut_pieces(["ab\n  cd\n  ef"], 9)) == ["ab\n  cd\n", "  ef"]
    assert list(cut_pieces(["abcdefgh"], 3)) == ["abc", "def", "gh"]


def test_a_byte_level_tokenizer_cuts_at_the_same_line_ends():
    text = "def f(x):\n    return x\n\n\nprint(f(1))\nprint(f(2))  # twice\n\n" * 50
    tokenizer = train_bpe([text], 300)
    pieces = list(cut_pieces([text], 200))
    assert len(pieces) > 10
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)
