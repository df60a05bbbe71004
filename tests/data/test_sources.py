from __future__ import annotations

import gzip
import json
import os
import sys
import types

import pytest

from hgrn2.data import text as text_module
from hgrn2.data.sources import open_corpus
from tests.refusals import refuses


def read(*specs, **options):
    corpus = open_corpus([str(s) for s in specs], **options)
    return corpus, {document.name: "".join(document.pieces) for document in corpus.documents()}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_folder_is_sorted_and_skips_what_is_no_text(corpus_dir, monkeypatch):
    (corpus_dir / ".hidden").mkdir()
    (corpus_dir / ".hidden" / "a.txt").write_text("no")
    (corpus_dir / ".secret").write_text("no")
    (corpus_dir / "picture.png").write_bytes(b"text, in truth")
    (corpus_dir / "program").write_bytes(b"\x7fELF\0")
    (corpus_dir / "empty.txt").write_bytes(b"")
    (corpus_dir / "latin.txt").write_bytes("café".encode("latin-1"))
    (corpus_dir / "damaged.gz").write_bytes(b"no gzip")
    (corpus_dir / "lost").symlink_to("nowhere")
    (corpus_dir / "sub" / "z.txt.gz").write_bytes(gzip.compress(b"zipped"))
    for block_bytes in (1 << 20, 16):
        monkeypatch.setattr(text_module, "BLOCK_BYTES", block_bytes)
        corpus, texts = read(corpus_dir)
        assert len(texts) == 41
        assert list(texts) == sorted(texts)
        assert texts["corpus/sub/z.txt.gz"] == "zipped"
        assert texts["corpus/sub/01.txt"] == "document number 1\nwith é and x\n"
        expected = {"hidden": 1, "binary": 2, "empty": 1, "not UTF-8": 1, "damaged": 1, "unreadable": 1}
        assert corpus.skipped == expected


def test_large_file_in_a_folder_is_checked_before_any_of_it_is_used(tmp_path):
    (tmp_path / "large.txt").write_bytes(b"good line\n" * 200_000 + b"\xff")
    (tmp_path / "small.txt").write_text("small")
    corpus, texts = read(tmp_path)
    assert list(texts.values()) == ["small"]
    assert corpus.skipped == {"not UTF-8": 1}


@pytest.mark.parametrize(
    ("data", "names"),
    [(b"", []), (b"ab\0", ["NUL", "offset 2"]), (b"ab\xff", ["0xff", "offset 2"])],
)
def test_bad_files_named_explicitly(tmp_path, data, names):
    path = tmp_path / "named.txt"
    path.write_bytes(data)
    for specs in ([path], [tmp_path, path], [path, tmp_path]):
        with refuses("unreadable", path, *names):
            read(*specs)


def test_order_and_names_do_not_depend_on_how_files_are_named(corpus_dir, monkeypatch):
    _, one = read(corpus_dir / "sub", corpus_dir / "00.txt")
    _, two = read(corpus_dir / "00.txt", corpus_dir / "sub", corpus_dir / "sub")
    monkeypatch.chdir(corpus_dir)
    _, three = read("sub", "00.txt")
    assert list(one.items()) == list(two.items()) == list(three.items())


def test_globs(corpus_dir, monkeypatch):
    monkeypatch.chdir(corpus_dir.parent)
    _, texts = read("corpus/*.txt")
    assert list(texts)[:2] == ["00.txt", "03.txt"]
    _, texts = read(f"{corpus_dir}/**/*[12].txt")
    assert "sub/01.txt" in texts
    assert len(texts) == 8
    odd = corpus_dir / "a[1].txt"
    odd.write_text("brackets")
    assert read(odd)[1] == {"a[1].txt": "brackets"}
    with refuses("not-found", "corpus/*.nothing"):
        read("corpus/*.nothing")


def test_equal_names_in_different_folders_stay_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    assert read(tmp_path / "b/x.txt", tmp_path / "a/x.txt")[1] == {"x.txt": "a", "x.txt (2)": "b"}


@pytest.mark.parametrize("suffix", ["", ".zst", ".gz"])
def test_jsonl(tmp_path, suffix):
    lines = b'{"body": "one"}\n\n{"body": ""}\n{"body": null}\r\n{"body": "caf\\u00e9", "x": 1}'
    if suffix == ".zst":
        lines = pytest.importorskip("zstandard").ZstdCompressor().compress(lines)
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(gzip.compress(lines) if suffix == ".gz" else lines)
    assert read(path, text_field="body")[1] == {f"d.jsonl{suffix}#1": "one", f"d.jsonl{suffix}#5": "café"}


@pytest.mark.parametrize(
    ("line", "code", "names"),
    [
        ('{"text": ', "unreadable", []),
        ("[" * 100_000, "unreadable", ["d.jsonl", "nested too deep"]),
        ('{"text": "a\\u0000b"}', "unreadable", ["NUL", "character 1"]),
        ("[1]", "unreadable", ["list"]),
        ('{"body": "x", "id": 1}', "not-found", ["'text'", "--text-field", "body, id"]),
        ('{"text": 5}', "unreadable", ["'text'", "int"]),
        ('{"text": "\\ud800"}', "unreadable", ["surrogate"]),
    ],
)
def test_bad_jsonl(tmp_path, line, code, names):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "good"}\n' + line)
    for spec in (path, tmp_path):
        with refuses(code, "line 2", *names):
            read(spec)


def test_jsonl_without_text(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"text": ""}])
    with refuses("unreadable", path):
        read(path)
    assert read(tmp_path)[0].skipped == {"empty": 1}


def test_zst_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with refuses("unavailable", "[data]"):
        read(tmp_path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "", "two"], "id": [1, 2, 3, 4]}), path, row_group_size=2)
    assert read(path, text_field="body")[1] == {"d.parquet#1": "one", "d.parquet#4": "two"}
    with refuses("not-found", path, "'text'", "--text-field", "body, id"):
        read(path)
    with refuses("unreadable", "row 1", "'id'", "int"):
        read(path, text_field="id")
    parquet.write_table(pyarrow.table({"text": ["one", None, "a\0b"]}), path, row_group_size=2)
    for spec in (path, tmp_path):
        with refuses("unreadable", "d.parquet, row 3", "NUL", "character 1"):
            read(spec)
    parquet.write_table(pyarrow.table({"text": ["one"]}), path)
    path.write_bytes(path.read_bytes()[:-10])
    with refuses("unreadable", path):
        read(path)


def test_parquet_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"x")
    with refuses("unavailable", "[data]"):
        read(tmp_path / "a.parquet")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets package; its calls are recorded."""
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "binary":
            return iter([{"text": "one"}, {"text": "tw\0o"}])
        if name == "missing":
            raise FileNotFoundError("Dataset 'missing' doesn't exist\nmore lines")
        return iter([{"text": "one"}, {"text": ""}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("hgrn2.data.documents.hub_reachable", lambda: True)
    return calls


def test_hub_datasets(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read("hf:name")[1] == {"hf:name#1": "one", "hf:name#3": "two"}
    assert read("org/name:config")[1] == {"hf:org/name:config#1": "one", "hf:org/name:config#3": "two"}
    read("hf:name::validation")
    read("hf:org/name:config:train[:10%]")
    assert hub == [
        ("name", None, "train", True),
        ("org/name", "config", "train", True),
        ("name", None, "validation", True),
        ("org/name", "config", "train[:10%]", True),
    ]


def test_hub_errors(hub, monkeypatch):
    with refuses("unreadable", "hf:missing", "Dataset 'missing' doesn't exist"):
        read("hf:missing")
    with refuses("unreadable", "hf:binary, row 2", "NUL", "character 2"):
        read("hf:binary")
    with refuses("not-found", "hf:name, row 1", "'body'", "--text-field", "text"):
        read("hf:name", text_field="body")
    with refuses("invalid-value", "hf:NAME"):
        read("hf:")
    monkeypatch.setattr("hgrn2.data.documents.hub_reachable", lambda: False)
    with refuses("unavailable", "hf:name", "offline"):
        read("hf:name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with refuses("unavailable", "[data]"):
        read("hf:name")


@pytest.mark.parametrize(("spec", "near"), [("note", "notes"), ("./note", "notes"), ("deep/nots.txt", "deep/note.txt")])
def test_a_misspelt_name_is_no_dataset(spec, near, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("notes", "deep"):
        (tmp_path / name).mkdir()
    (tmp_path / "deep" / "note.txt").write_text("a text")
    with refuses("not-found", spec, near):
        read(spec)


@pytest.mark.parametrize("spec", ["none.txt", "./none", "none/none.jsonl", "/none", "a b", "none"])
def test_nothing_there(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refuses("not-found", spec):
        read(spec)


def test_nothing_named(corpus_dir, monkeypatch):
    monkeypatch.chdir(corpus_dir)
    with refuses("invalid-value", "stdlib"):
        open_corpus([])
    with refuses("invalid-value", "''"):
        open_corpus("")


@pytest.mark.parametrize(("link", "target"), [("loop", "loop"), ("lost", "nowhere")])
def test_links_that_lead_nowhere(tmp_path, monkeypatch, link, target):
    monkeypatch.chdir(tmp_path)
    os.symlink(target, link)
    with refuses("not-found", repr(link)):
        read(link)


def test_a_name_too_long_or_of_an_unknown_user(tmp_path):
    for spec in ("x" * 5000, "~nobody-of-that-name/x"):
        with refuses("unreadable", spec):
            read(spec)


def test_pipes_and_devices(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader, writer = os.pipe()
    try:
        for spec in (tmp_path / "fifo", f"/dev/fd/{reader}", os.devnull):
            with refuses("unsupported", spec):
                read(spec)
    finally:
        os.close(reader)
        os.close(writer)
    with refuses("not-found", tmp_path, "1 unreadable"):
        read(tmp_path)


def test_subfolders_that_are_not_read_are_counted(corpus_dir, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("not followed")
    (corpus_dir / "link").symlink_to(tmp_path / "elsewhere")
    (corpus_dir / "up").symlink_to(corpus_dir)
    (corpus_dir / ".hidden").symlink_to(corpus_dir)
    (corpus_dir / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    # the super-user may read everything, so permissions alone would not do
    monkeypatch.setattr(os, "scandir", closed)
    corpus, texts = read(corpus_dir)
    assert len(texts) == 40
    assert corpus.skipped == {"link to a folder": 2, "unreadable folder": 1}


def test_folder_with_nothing_to_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with refuses("not-found", tmp_path, "1 binary"):
        read(tmp_path)


def test_standard_library():
    corpus = open_corpus("stdlib")
    names = [source.name for source in corpus.sources]
    assert {"stdlib/os.py", "stdlib/json/decoder.py"} <= set(names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    assert names == sorted(names)
    assert corpus.num_bytes is not None
    assert corpus.num_bytes > 5_000_000
    first = next(corpus.documents())
    assert "".join(first.pieces)


def test_the_standard_library_without_its_tables():
    names = [source.name for source in open_corpus("stdlib").sources]
    assert not any(part in name.split("/") for name in names for part in ("encodings", "pydoc_data"))
    assert not {"stdlib/locale.py", "stdlib/html/entities.py", "stdlib/stringprep.py"} & set(names)
    assert not any("_sysconfigdata" in name for name in names)


def test_a_validation_part_of_the_standard_library():
    """Of Python 3.11 to 3.13: 62, 57 and 50 files, 406, 342 and 339 kB."""
    corpus, held_out = open_corpus("stdlib"), open_corpus("stdlib-validation")
    assert 40 < len(held_out.sources) < 80
    assert 250_000 < held_out.num_bytes < 500_000
    assert max(source.num_bytes for source in held_out.sources) < 20_000
    # by name, so the same in every version of Python
    assert {"stdlib/fnmatch.py", "stdlib/queue.py", "stdlib/asyncio/queues.py"} <= {s.name for s in held_out.sources}
    rest = corpus.without(held_out)
    assert len(rest.sources) == len(corpus.sources) - len(held_out.sources)


def test_fingerprint_follows_content_and_field(corpus_dir):
    before = open_corpus(corpus_dir).fingerprint()
    assert open_corpus(corpus_dir).fingerprint() == before
    assert open_corpus(corpus_dir, "body").fingerprint() != before
    (corpus_dir / "00.txt").write_text("changed")
    changed = open_corpus(corpus_dir).fingerprint()
    assert changed != before
    (corpus_dir / "new.txt").write_text("new")
    assert open_corpus(corpus_dir).fingerprint() not in {before, changed}


def test_documents_are_read_lazily(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "good"}\n' * 3 + "bad")
    documents = open_corpus(path).documents()
    assert ["".join(next(documents).pieces) for _ in range(3)] == ["good"] * 3
    with refuses("unreadable", "line 4"):
        next(documents)


def test_of_several_names_of_a_file_the_smallest_counts(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"text {i}")
        (folder / f"z{i:02}.txt").symlink_to(folder / f"{i:02}.txt")
    _, wanted = read(folder)
    assert list(wanted) == [f"texts/{i:02}.txt" for i in range(20)]
    walk, listdir = os.walk, os.listdir

    def other_order(top, **options):
        for place, folders, files in walk(top, **options):
            yield place, folders[::-1], files[::-1]

    monkeypatch.setattr(os, "walk", other_order)
    monkeypatch.setattr(os, "listdir", lambda place: listdir(place)[::-1])
    assert read(folder)[1] == wanted
    assert set(read(f"{folder}/*.txt")[1]) == {f"{i:02}.txt" for i in range(20)}
    # a name the user gave counts whatever it is
    assert "z07.txt" in read(folder, folder / "z07.txt")[1]


def test_globs_follow_no_links_to_folders(tmp_path):
    folder = tmp_path / "g"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt", ".hidden/d.txt", "deep/.e.txt"):
        (folder / name).write_text(name)
    for link in ("x", "y", "deep/x"):
        (folder / link).symlink_to(folder)
    corpus, texts = read(f"{folder}/**/*.txt")
    assert list(texts) == ["a.txt", "deep/b.txt", "deep/er/c.txt"]
    assert corpus.skipped["link to a folder"] == 3
    for pattern, wanted in [
        ("**", ["a.txt", "deep/b.txt", "deep/er/c.txt"]),
        ("**/**/*.txt", ["a.txt", "deep/b.txt", "deep/er/c.txt"]),
        ("*/b.txt", ["deep/b.txt"]),
        ("*/*/*", ["deep/er/c.txt"]),
        (".h*/*", [".hidden/d.txt"]),
        ("d??p/er/c.txt", ["deep/er/c.txt"]),
        ("a.txt/*", None),
        ("**/nothing", None),
    ]:
        if wanted is None:
            with refuses("not-found", pattern):
                read(f"{folder}/{pattern}")
        else:
            assert list(read(f"{folder}/{pattern}")[1]) == wanted, pattern


@pytest.mark.parametrize("name", ["c4.00000.json.gz", "part-00000", "lines.json", "lines.txt", "lines.jl"])
def test_json_lines_under_another_name(tmp_path, name):
    path = tmp_path / "in" / name
    path.parent.mkdir()
    lines = b'{"text":"one small text","url":"x"}\n{"text":"another","url":"y"}\n'
    path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    wanted = ["one small text", "another"]
    assert list(read(path)[1].values()) == list(read(path.parent)[1].values()) == wanted
    # asked about, if the text is under another key
    with refuses("not-found", path, "line 1", "'body'", "--text-field", "text, url"):
        read(path, text_field="body")


def test_other_json_is_text(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    texts = {
        "package.json": '{\n "name": "x"\n}\n', "line.json": '{"name": "x"}\n', "objects.json": '{"a": 1}\n{"a": 2}\n',
        "set.txt": "{1, 2}\n", "array.json": '[\n {"text": "a"}]', "deep.json": "[" * 100_000,
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    assert read(folder)[1] == {f"in/{name}": text for name, text in texts.items()}
    assert read(folder / "line.json")[1] == {"line.json": texts["line.json"]}
    with refuses("unreadable", "array.json"):
        read(folder / "array.json")
