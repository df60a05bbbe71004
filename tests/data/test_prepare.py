from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from itertools import pairwise

import pytest

from hgrn2.data import ByteTokenizer, load_tokenizer, train_bpe
from hgrn2.data.encode import encode_pieces
from hgrn2.data.pieces import Piece
from hgrn2.data.prepare import prepare
from hgrn2.data.prepared import PreparedData, is_prepared
from hgrn2.data.tokens import TokenDataset
from hgrn2.data.writer import TokenWriter
from hgrn2.storage.staging import staged_directory, write_text_atomic
from tests.refusals import refuses


def texts(prepared):
    """Texts of the training and of the validation documents."""
    sides = []
    for dataset in (prepared.train, prepared.validation):
        bounds = [*dataset.document_starts.tolist(), dataset.num_tokens]
        pairs = pairwise(bounds)
        sides.append([prepared.tokenizer.decode(dataset.tokens(a, b)) for a, b in pairs])
    return sides


def files(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def leftovers(directory):
    return [path.name for path in directory.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_whole_documents_on_either_side(corpus_dir, tmp_path, tokenizer):
    prepared = prepare(corpus_dir, tokenizer, tmp_path / "out")
    train, validation = texts(prepared)
    originals = [path.read_text(encoding="utf-8") for path in corpus_dir.rglob("*.txt")]
    assert sorted(train + validation) == sorted(originals)
    assert 1 <= len(validation) <= 8
    assert prepared.train.num_text_bytes == sum(len(text.encode()) for text in train)
    assert not prepared.reused
    assert leftovers(prepared.directory) == []
    # it opens without the corpus, and tampering shows
    shutil.rmtree(corpus_dir)
    again = PreparedData.open(tmp_path / "out")
    assert texts(again) == [train, validation]
    assert again.tokenizer.fingerprint() == prepared.tokenizer.fingerprint()
    assert again.tokenizer.name == tokenizer
    assert f"{prepared.train.num_tokens:,} training tokens" in prepared.summary()


def test_the_same_whatever_the_workers_order_and_place(corpus_dir, tmp_path, monkeypatch):
    # tasks of a few pieces each, so that two workers have something to get out of order
    monkeypatch.setattr("hgrn2.data.encode._TASK_CHARS", 100)
    one = prepare([corpus_dir / "sub", corpus_dir / "00.txt"], "bpe:280", tmp_path / "one", num_workers=1)
    shutil.copytree(corpus_dir, tmp_path / "elsewhere" / "corpus")
    monkeypatch.chdir(tmp_path)
    two = prepare(
        ["elsewhere/corpus/00.txt", "elsewhere/corpus/sub"],
        "bpe:280",
        tmp_path / "two",
        num_workers=2,
        shard_tokens=10**8,
    )
    found, expected = files(two.directory), files(one.directory)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == ["manifest.json"]


def test_reuse_and_remaking(corpus_dir, tmp_path):
    out = tmp_path / "out"
    first = prepare(corpus_dir, "bytes", out)
    stamp = (out / "manifest.json").stat().st_mtime_ns
    assert prepare(corpus_dir, "bytes", out).reused
    assert prepare([str(corpus_dir)], ByteTokenizer(), str(out)).reused
    assert (out / "manifest.json").stat().st_mtime_ns == stamp
    assert not prepare(corpus_dir, "bytes", out, rebuild=True).reused
    for change in ({"seed": 1}, {"validation_fraction": 0.2}, {"tokenizer": "bpe:270"}, {"shard_tokens": 99}):
        assert not prepare(corpus_dir, out_dir=out, **change).reused
        assert prepare(corpus_dir, out_dir=out, **change).reused
    path = corpus_dir / "00.txt"
    path.write_text("something else")
    changed = prepare(corpus_dir, "bytes", out)
    assert not changed.reused
    assert any("something else" in text for side in texts(changed) for text in side)
    # same size, later
    os.utime(path, ns=(1, 1))
    assert not prepare(corpus_dir, "bytes", out).reused
    (corpus_dir / "00.txt").unlink()
    assert prepare(corpus_dir, "bytes", out).train.num_tokens != first.train.num_tokens
    assert leftovers(out) == []


def test_a_damaged_set_is_an_error_until_rebuilt(corpus_dir, tmp_path):
    out = tmp_path / "out"
    prepare(corpus_dir, "bytes", out)
    shard = out / "train" / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with refuses("damaged", "tokens-00000.bin", "--rebuild"):
        prepare(corpus_dir, "bytes", out)
    assert not prepare(corpus_dir, "bytes", out, rebuild=True).reused
    (out / "bytes_tokenizer.json").unlink()
    shutil.copy(train_bpe(["a b"], 260).save(tmp_path), out / "tokenizer.json")
    with refuses("mismatch", out, "train"):
        PreparedData.open(out)


def test_trained_tokenizer_sees_training_text_only(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("aaaa " * 100)
    (folder / "b.txt").write_text("bbbb " * 100)
    prepared = prepare(folder, "bpe:300", tmp_path / "out")
    train, validation = texts(prepared)
    assert len(train) == len(validation) == 1
    vocab = prepared.tokenizer.backend.get_vocab()
    assert train[0][:4] in vocab
    assert validation[0][:2] not in vocab


def test_sample_for_the_tokenizer_is_bounded(corpus_dir, tmp_path, monkeypatch):
    # the function of the same name hides the module
    module = sys.modules["hgrn2.data.prepare"]
    monkeypatch.setattr(module, "BPE_SAMPLE_BYTES", 100)
    seen = []
    monkeypatch.setattr(module, "train_bpe", lambda sample, size: seen.extend(sample) or train_bpe(seen, size))
    prepare(corpus_dir, "bpe:280", tmp_path / "out")
    assert 100 <= sum(len(text.encode()) for text in seen) < 200


@pytest.mark.parametrize("in_folder", [False, True])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_one_document_is_cut_at_a_line_end(tmp_path, in_folder, suffix):
    import gzip

    folder = tmp_path / "corpus"
    folder.mkdir()
    text = "".join(f"this is line {i}\n" for i in range(20_000))
    path = folder / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    (folder / "b.txt").write_bytes(b"\0")
    prepared = prepare(folder if in_folder else path, "bytes", tmp_path / "out")
    train, validation = texts(prepared)
    assert train[0] + validation[0] == text
    assert len(validation[0]) / len(text) == pytest.approx(0.05, abs=0.001)
    assert train[0].endswith("\n")


def test_at_least_one_document_on_each_side(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    for fraction in (0.001, 0.999):
        train, validation = texts(prepare(folder, "bytes", tmp_path / "out", validation_fraction=fraction))
        assert len(train) == len(validation) == 1


def test_validation_data_given(corpus_dir, tmp_path):
    held_out = corpus_dir / "sub" / "01.txt"
    prepared = prepare(corpus_dir, "bytes", tmp_path / "out", validation=held_out)
    train, validation = texts(prepared)
    assert validation == [held_out.read_text(encoding="utf-8")]
    assert validation[0] not in train
    assert len(train) == 39
    assert "1 also in the validation data" in prepared.summary()
    assert prepare(corpus_dir, "bytes", tmp_path / "out", validation=[held_out]).reused
    assert not prepare(corpus_dir, "bytes", tmp_path / "out").reused


def test_validation_data_that_is_all_there_is(corpus_dir, tmp_path):
    with refuses("contradiction", "validation"):
        prepare(corpus_dir, "bytes", tmp_path / "out", validation=corpus_dir)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "bad.txt").write_bytes(b"\0")
    with refuses("not-found", tmp_path / "v", "1 binary"):
        prepare(corpus_dir, "bytes", tmp_path / "out", validation=tmp_path / "v")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "code", "names"),
    [
        (b"\0", "not-found", ["1 binary"]),
        (b"x", "invalid-value", [1]),
    ],
)
def test_nothing_left(tmp_path, content, code, names):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_bytes(content)
    with refuses(code, *names):
        prepare(folder, "bytes", tmp_path / "out")
    assert os.listdir(tmp_path) == ["corpus"]


def test_bad_input_leaves_the_old_set_alone(corpus_dir, tmp_path):
    out = tmp_path / "out"
    prepare(corpus_dir, "bytes", out)
    before = files(out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n' * 5 + "bad")
    with refuses("unreadable", bad, "line 6"):
        prepare(bad, "bytes", out)
    assert files(out) == before
    assert leftovers(out) == []


@pytest.mark.parametrize("options", [{"validation_fraction": 0.0}, {"validation_fraction": 1}, {"num_workers": 0}])
def test_bad_settings(corpus_dir, tmp_path, options):
    with refuses("invalid-value", *options):
        prepare(corpus_dir, "bytes", tmp_path / "out", **options)


def test_nothing_of_the_users_is_overwritten(corpus_dir, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for target in (tmp_path / "mine", corpus_dir / "00.txt"):
        with refuses("already-exists", target):
            prepare(corpus_dir, "bytes", target)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with refuses("unwritable", corpus_dir / "00.txt" / "below"):
        prepare(corpus_dir, "bytes", corpus_dir / "00.txt" / "below")


def test_sets_of_another_version_are_replaced(corpus_dir, tmp_path):
    out = tmp_path / "out"
    prepare(corpus_dir, "bytes", out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))
    with refuses("version", "version 0"):
        PreparedData.open(out)
    assert not prepare(corpus_dir, "bytes", out).reused
    assert is_prepared(out)


def test_a_prepared_set_is_no_text(corpus_dir, tmp_path):
    prepare(corpus_dir, "bytes", tmp_path / "out")
    with refuses("unsupported", tmp_path / "out"):
        prepare(tmp_path / "out", "bytes", tmp_path / "other")


def test_full_disk(corpus_dir, tmp_path, monkeypatch):
    def add(self, piece, starts_document):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenWriter, "add", add)
    with refuses("unwritable", tmp_path / "out", "disk is full"):
        prepare(corpus_dir, "bytes", tmp_path / "out")
    assert os.listdir(tmp_path) == ["corpus"]


@pytest.mark.parametrize("code", [errno.EFBIG, errno.EDQUOT])
def test_limits_on_sizes(corpus_dir, tmp_path, monkeypatch, code):
    def add(self, piece, starts_document):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(TokenWriter, "add", add)
    with refuses("unwritable", tmp_path / "out", "ulimit" if code == errno.EFBIG else "disk is full"):
        prepare(corpus_dir, "bytes", tmp_path / "out")
    assert os.listdir(tmp_path) == ["corpus"]


def test_a_failure_takes_the_parent_folders_it_made(corpus_dir, tmp_path, monkeypatch):
    def add(self, piece, starts_document):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TokenWriter, "add", add)
    (tmp_path / "mine").mkdir()
    with refuses("unwritable", tmp_path / "mine" / "new" / "prepared" / "out"):
        prepare(corpus_dir, "bytes", tmp_path / "mine" / "new" / "prepared" / "out")
    assert os.listdir(tmp_path / "mine") == []


def test_parents_that_another_process_took_away_are_made_again(tmp_path, monkeypatch):
    target = tmp_path / "new" / "out"
    real_open = os.open

    def open_late(path, *args):
        monkeypatch.setattr(os, "open", real_open)
        shutil.rmtree(tmp_path / "new")
        return real_open(path, *args)

    monkeypatch.setattr(os, "open", open_late)
    with staged_directory(target) as stage:
        (stage / "one").write_text("one")
    assert os.listdir(target) == ["one"]


def test_interrupt_leaves_nothing(corpus_dir, tmp_path, monkeypatch):
    def add(self, piece, starts_document):
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenWriter, "add", add)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus_dir, "bytes", tmp_path / "out")
    assert os.listdir(tmp_path) == ["corpus"]


def test_what_a_killed_process_left_is_cleared(corpus_dir, tmp_path):
    stage = tmp_path / ".out.partial"
    (stage / "train").mkdir(parents=True)
    (stage / "stray.bin").write_bytes(b"half")
    prepared = prepare(corpus_dir, "bytes", tmp_path / "out")
    assert sorted(os.listdir(prepared.directory)) == [
        "bytes_tokenizer.json",
        "manifest.json",
        "train",
        "validation",
    ]
    assert leftovers(prepared.directory) == []


def test_processes_that_want_the_same_set_wait_for_one(corpus_dir, tmp_path):
    results = []

    def work():
        results.append(prepare(corpus_dir, "bytes", tmp_path / "out"))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(prepared.reused for prepared in results) == [False] + [True] * 5
    assert leftovers(tmp_path / "out") == []


def test_staging_replaces_as_a_whole(tmp_path):
    target = tmp_path / "t"
    for content in ("one", "two"):
        with staged_directory(target) as stage:
            (stage / content).write_text(content)
            assert not (target / content).exists()
        assert os.listdir(target) == [content]
    with pytest.raises(RuntimeError, match="oops"), staged_directory(target) as stage:
        raise RuntimeError("oops")
    assert os.listdir(tmp_path) == ["t"]


# in a process of its own, so that it can be killed
BETWEEN_THE_RENAMES = """
import os, sys
from pathlib import Path
from hgrn2.storage.staging import staged_directory

target, killed = Path(sys.argv[1]), sys.argv[2] == "True"
real = Path.rename

def rename(self, to):
    real(self, to)
    if Path(to).name == ".t.old":
        if killed:
            os._exit(9)
        raise KeyboardInterrupt

Path.rename = rename
with staged_directory(target) as stage:
    (stage / "new").touch()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_an_old_set_is_not_lost_between_the_two_renames(tmp_path, killed):
    target = tmp_path / "t"
    with staged_directory(target) as stage:
        (stage / "precious").touch()
    command = [sys.executable, "-c", BETWEEN_THE_RENAMES, str(target), str(killed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if killed:
        assert done.returncode == 9
        assert ".t.old" in os.listdir(tmp_path)
        assert "t" not in os.listdir(tmp_path)
        with pytest.raises(RuntimeError), staged_directory(target):
            raise RuntimeError
    else:
        assert "KeyboardInterrupt" in done.stderr
    assert os.listdir(tmp_path) == ["t"]
    assert os.listdir(target) == ["precious"]


def test_a_link_stays_a_link(corpus_dir, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    for seed in range(3):
        prepared = prepare(corpus_dir, "bytes", tmp_path / "link", seed=seed)
        assert prepared.directory == tmp_path / "disk"
        assert (tmp_path / "link").is_symlink()
    assert leftovers(tmp_path / "disk") == []


def replace(target, another, beside):
    """Puts a copy of another set in place of the target, as another process would."""
    shutil.copytree(another, beside)
    target.rename(beside.with_name("gone"))
    beside.rename(target)


def test_a_set_that_is_replaced_while_it_is_opened(corpus_dir, tmp_path, monkeypatch):
    target = prepare(corpus_dir, "bytes", tmp_path / "out").directory
    another = prepare(corpus_dir, train_bpe(["document"], 260), tmp_path / "another").directory
    real = TokenDataset.open

    def open_late(directory, verify=None):
        opened = real(directory, verify)
        if not (tmp_path / "gone").exists():
            replace(target, another, tmp_path / "copy")
        return opened

    monkeypatch.setattr(TokenDataset, "open", open_late)
    found = PreparedData.open(target)
    assert {found.train.vocab_size, found.validation.vocab_size, found.tokenizer.vocab_size} == {260}


def test_a_moment_without_a_set(corpus_dir, tmp_path, monkeypatch):
    target = prepare(corpus_dir, "bytes", tmp_path / "out").directory
    target.rename(tmp_path / "away")
    monkeypatch.setattr("time.sleep", lambda seconds: (tmp_path / "away").rename(target))
    assert PreparedData.open(target).train.num_tokens


def test_a_set_of_another_process_is_not_taken_for_ours(corpus_dir, tmp_path, monkeypatch):
    target = prepare(corpus_dir, "bytes", tmp_path / "out").directory
    another = prepare(corpus_dir, "bytes", tmp_path / "another", seed=1).directory
    real = PreparedData.open

    def open_late(directory, *args, **options):
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
        replace(target, another, tmp_path / "copy")
        return real(directory, *args, **options)

    monkeypatch.setattr(PreparedData, "open", open_late)
    with refuses("in-use", target):
        prepare(corpus_dir, "bytes", target)


def test_threads_that_write_the_same_file(tmp_path):
    path = tmp_path / "file"
    errors = []

    def work(letter):
        for _ in range(20):
            try:
                write_text_atomic(path, letter * 1000)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert path.read_text() in {letter * 1000 for letter in "abc"}
    assert os.listdir(tmp_path) == ["file"]


def test_staging_where_another_process_moves_the_same_folder(tmp_path, monkeypatch):
    target = tmp_path / "new" / "t"
    stage = tmp_path / "new" / ".t.partial"
    stage.mkdir(parents=True)
    mkdir = os.mkdir
    # it takes its finished folder to the target, then fails at the next one and takes the parents with it
    events = [lambda: shutil.rmtree(stage.parent), lambda: stage.rename(target)]

    def mkdir_in_a_race(path, *args):
        if path == stage and events:
            events.pop()()
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        mkdir(path, *args)

    monkeypatch.setattr(os, "mkdir", mkdir_in_a_race)
    with staged_directory(target) as folder:
        (folder / "mine").write_text("")
    assert not events
    assert os.listdir(tmp_path / "new") == ["t"]
    assert os.listdir(target) == ["mine"]


def test_staging_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for parent in ("file", "link"):
        with refuses("unwritable", tmp_path / parent / "t"), staged_directory(tmp_path / parent / "t"):
            pass


def test_progress(corpus_dir, tmp_path, capsys):
    prepare(corpus_dir, "bytes", tmp_path / "one", progress=True)
    assert "preparing" in capsys.readouterr().err
    prepare(corpus_dir, "bpe:280", tmp_path / "trained", progress=True)
    shown = capsys.readouterr().err
    assert "training the tokenizer" in shown
    assert "preparing" in shown
    prepare(corpus_dir, "bytes", tmp_path / "two")
    assert capsys.readouterr().err == ""


class DyingTokenizer(ByteTokenizer):
    def encode_batch(self, texts):
        sys.stdout.flush()
        os._exit(3)


def test_a_dead_worker_is_an_error():
    with refuses("unavailable", "num_workers=1"):
        list(encode_pieces([(0, Piece("text"))], DyingTokenizer(), "<u2", 2))


def test_few_tasks_are_read_ahead():
    # each fills a task
    text = "0123456789" * 110_000
    read = []

    def pieces():
        for i in range(100):
            read.append(i)
            yield i, Piece(text)

    encoded = encode_pieces(pieces(), load_tokenizer("bytes"), "<u2", 1)
    assert next(encoded)[0] == 0
    assert len(read) <= 3
    encoded.close()


def test_copies_stay_on_one_side(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        for name in (f"{i:02}.txt", f"copy of {i:02}.txt"):
            (folder / name).write_text(f"text number {i} " * 20)
    prepared = prepare(folder, "bytes", tmp_path / "out", validation_fraction=0.2)
    train, held_out = map(set, texts(prepared))
    assert not train & held_out
    assert len(train) + len(held_out) == 40
    assert prepared.train.num_documents == 2 * len(train)
    assert prepared.validation.num_documents == 2 * len(held_out)


def test_copies_alone_cannot_be_split(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("the same")
    with refuses("invalid-value", "all 3 documents"):
        prepare(str(tmp_path / "*.txt"), "bytes", tmp_path / "out")


def test_validation_data_that_is_training_data_too(tmp_path):
    for name, texts in {"train": "abcdefghij", "held": "bxyg"}.items():
        (tmp_path / name).mkdir()
        for text in texts:
            (tmp_path / name / f"{name}-{text}.txt").write_text(text * 100)
    for _ in ("prepared", "used again"):
        with pytest.warns(UserWarning, match=r"2 of 4 documents are in the training data as well \(held/held-b\.txt"):
            prepare(tmp_path / "train", "bytes", tmp_path / "out", validation=tmp_path / "held")


def test_json_lines_in_a_file_of_another_name_are_documents(tmp_path):
    lines = "".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(20))
    (tmp_path / "lines.json").write_text(lines)
    prepared = prepare(tmp_path / "lines.json", "bytes", tmp_path / "out")
    assert prepared.train.num_documents + prepared.validation.num_documents == 20


@pytest.mark.parametrize(
    ("num_bytes", "size"), [(50, "50 bytes"), (1500, "1.5 kB"), (2_500_000, "2.5 MB")]
)  # fmt: skip
def test_a_summary_of_little_text(tmp_path, num_bytes, size):
    (tmp_path / "a.txt").write_text("a" * num_bytes)
    (tmp_path / "b.txt").write_text("b")
    prepared = prepare(tmp_path / "a.txt", "bytes", tmp_path / "out", validation=tmp_path / "b.txt")
    assert f"(1 document, {size}), 2 validation tokens (1 document, 1 byte)" in prepared.summary()


def test_sides_from_different_sets(corpus_dir, tmp_path):
    one, two = (prepare(corpus_dir, "bytes", tmp_path / str(seed), seed=seed).directory for seed in (1, 2))
    shutil.rmtree(one / "validation")
    shutil.copytree(two / "validation", one / "validation")
    with refuses("mismatch", one):
        PreparedData.open(one)
    # an older set has neither a digest nor the fingerprints of its parts
    manifest = json.loads((one / "manifest.json").read_text())
    for key in ("hgrn2_digest", "fingerprints", "copies"):
        del manifest[key]
    (one / "manifest.json").write_text(json.dumps(manifest))
    assert PreparedData.open(one).validation.num_tokens
