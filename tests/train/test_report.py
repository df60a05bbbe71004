"""report.html: its numbers are those of the records, its HTML is well formed, and no text of a run is obeyed by it."""

from __future__ import annotations

import errno
import json
import math
import re
import sys

import numpy as np
import pytest
import torch

from hgrn2.data.prepare import prepare
from hgrn2.errors import UserError
from hgrn2.models import HGRN2Config
from hgrn2.train.curves import log_ticks, nice_ticks, thin
from hgrn2.train.display import PlainDisplay
from hgrn2.train.gates import GateSummary
from hgrn2.train.hints import first_words, generate_command, program, resume_command
from hgrn2.train.loop import Trainer
from hgrn2.train.metrics import read_metrics
from hgrn2.train.report import write_report
from hgrn2.train.report.words import compact, duration, plain, rich, size
from hgrn2.train.runs import resume_language_run, start_language_run
from hgrn2.train.settings import RunSettings
from tests.pages import Page, check_headings, check_pictures, check_self_contained
from tests.refusals import refuses

HOSTILE = "def f():</pre><script>alert(1)</script>\x1b[31m\u202e&amp;\x00\ud800</script>\n\tok"


def make_run(run_dir, num_steps=900, num_layers=3, sample=HOSTILE):
    run_dir.mkdir(parents=True, exist_ok=True)
    records = [{"kind": "start", "step": 0, "device": "cpu", "num_threads": 2, "torch": "2.13", "hgrn2": "0",
                "parameters": 2_600_000, "prompt": "def it's(x):",
                "data": {"tokenizer": "bpe:4096", "vocab_size": 4096, "skipped": {"binary": 2},
                         "train": {"documents": 541, "text_bytes": 9_331_437, "tokens": 2_600_000},
                         "validation": {"documents": 62, "text_bytes": 405_780, "tokens": 112_000}}}]  # fmt: skip
    for step in range(1, num_steps + 1):
        common = {"step": step, "tokens": step * 4096, "elapsed_s": round(step * 0.83, 3)}
        loss = None if step in (7, 8, 400) else 3 + 5 * math.exp(-step / 100) + 0.1 * math.sin(step)
        records.append({"kind": "train", **common, "loss": loss, "grad_norm": 0.5, "learning_rate": 1e-3 * step,
                        "tokens_per_s": 4935.1, "memory_bytes": 2**30})  # fmt: skip
        if step % 300 == 0:
            bits = 1.4 - step / 2000
            records.append({"kind": "validation", **common, "val_loss": 3.3 - step / 1000, "val_perplexity": 12.5,
                            "val_bits_per_byte": bits, "val_tokens": 100, "val_text_bytes": 340})  # fmt: skip
            records.append({"kind": "sample", "step": step, "tokens": step * 4096, "text": sample})
    records.insert(500, {"kind": "start", "step": 495, "device": "cuda", "torch": "2.14", "hgrn2": "0"})
    bits = {"gzip -9": 1.77, "xz -9": 1.61}
    records.append({"kind": "compressors", "step": num_steps, "text_bytes": 405_780, "bits_per_byte": bits})
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {"model": {"hidden_size": 192, "num_hidden_layers": num_layers, "odd": "<b>" + HOSTILE[:40]},
              "train": RunSettings.from_flat({"max_steps": num_steps, "sample_prompt": "def f():"}).to_flat(),
              "data": {"data": ["<i>notes</i>"], "tokenizer": "bpe:4096", "prepared": "a\x1bb"}}  # fmt: skip
    (run_dir / "config.json").write_text(json.dumps(config))
    layers = np.arange(num_layers)
    GateSummary(
        layers, np.full((num_layers, 8), 0.25), np.geomspace(1, 999, num_layers * 8).reshape(num_layers, 8),
        np.ones((num_layers, 50), int), np.linspace(0, 1, 51), layers + 1.0, np.array(8192),
    ).save(run_dir)  # fmt: skip
    return run_dir


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "a <run>")
    write_report(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def text(run_dir):
    return (run_dir / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_is_well_formed_and_small(page, text):
    check_headings(page, text, least=7)


def test_every_picture_says_in_words_what_it_shows(page):
    check_pictures(page, 2 + 3 + 4)


def test_nothing_is_fetched_and_only_our_script_runs(page, text):
    check_self_contained(page, text)


def test_text_of_a_run_is_shown_and_not_obeyed(page, text):
    assert "<script>alert" not in text
    assert "<i>notes" not in text
    assert "a <run>" in page.text()
    assert "def f():</pre><script>alert(1)</script>ESC[31mU+202E&amp;NUL U+D800</script>\n\tok" in page.text()
    # nothing but line ends and tabs is left that a page could not show
    assert all(c.isprintable() or c in "\n\t" for c in text)
    assert ("mark", "def f():") in page.texts


def test_the_curves_are_the_records(run_dir, page):
    records = read_metrics(run_dir)
    points = json.loads(next(data for tag, data in page.texts if tag == "script" and data.startswith("{")))
    for kind, loss in (("train", "loss"), ("validation", "val_loss")):
        own = {r["step"]: r for r in records if r["kind"] == kind and r[loss] is not None}
        found = points[kind]
        assert 3 <= len(found["step"]) <= 400
        for key in found.keys() - {"smoothed"}:
            assert found[key] == [own[step][key] for step in found["step"]], key
        assert found["step"][0] == min(own)
        assert found["step"][-1] == max(own)


def test_the_numbers_are_the_records(run_dir, page):
    shown = page.text()
    last = [r for r in read_metrics(run_dir) if r["kind"] == "validation"][-1]
    for wanted in (f"{last['val_bits_per_byte']:.3f}", "12.50", "2.6 million parameters", "3.69 million tokens",
                   "12 min 27 s", "gzip -9 1.770", "9.33 MB", "406 kB", "62", "541", "1.00 GiB",
                   "4,935 tokens per second", "resumed (device cuda, torch now 2.14)", "to 8 skipped",
                   "9.3 MB of text of the same kind",
                   "its own size (10.4 MB) is not counted", "finished"):  # fmt: skip
        assert wanted in shown, wanted
    for record in (r for r in read_metrics(run_dir) if r["kind"] == "validation"):
        assert f"{record['val_loss']:.4f}" in shown
        assert f"{record['val_bits_per_byte']:.4f}" in shown


def test_the_dots_stand_where_their_numbers_say(run_dir, text):
    """Left and top of the held-out dots of the first chart, back to tokens and loss."""
    chart = text[text.index("Loss against tokens") : text.index("Loss against time")]
    high = float(re.search(r'data-high="([^"]+)"', chart)[1])
    dots = re.findall(r'class="dot held-out" style="left:([\d.]+)%;top:([\d.]+)%"', chart)
    ticks = re.findall(r'class="tick y" style="top:([\d.]+)%">([\d.]+)<', chart)
    (top0, value0), (top1, value1) = [(float(t), float(v)) for t, v in (ticks[0], ticks[-1])]
    records = [r for r in read_metrics(run_dir) if r["kind"] == "validation"]
    assert len(dots) == len(records) == 3
    for (left, top), record in zip(dots, records, strict=True):
        assert float(left) / 100 * high == pytest.approx(record["tokens"], rel=1e-3)
        loss = value0 + (float(top) - top0) / (top1 - top0) * (value1 - value0)
        assert loss == pytest.approx(record["val_loss"], abs=0.01)


def test_a_report_of_little(tmp_path):
    """A run that has just begun, one whose steps were all skipped, and one without validation."""
    start = {"kind": "start", "step": 0}
    step = {"kind": "train", "step": 1, "tokens": 8, "elapsed_s": 0.1, "loss": None}
    for records in (
        [start],
        [start, step],
        [start, step | {"loss": 2.0}],
        [start, step | {"loss": 2.0, "elapsed_s": 0}],
    ):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        Page(write_report(tmp_path).read_text(encoding="utf-8"))
    last = {"kind": "validation", "step": 2, "tokens": 16, "elapsed_s": 0.2, "val_loss": None, "val_perplexity": None}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [start, step, last]))
    assert "not finite" in Page(write_report(tmp_path).read_text(encoding="utf-8")).text()
    (tmp_path / "metrics.jsonl").unlink()
    with refuses("not-found", "metrics.jsonl"):
        write_report(tmp_path)


@pytest.mark.parametrize(("num_steps", "num_labels"), [(3, 0), (30, 2)])
def test_labels_of_curves_stay_in_the_chart(tmp_path, num_steps, num_labels):
    """The label of the training loss starts left of 70 %, and is left out if the loss is high until then."""
    records = [{"kind": "start", "step": 0}]
    for step in range(1, num_steps + 1):
        loss = 9.0 if num_steps == 3 and step < 3 else 8.0 - step / 10
        records.append({"kind": "train", "step": step, "tokens": 8 * step, "elapsed_s": step, "loss": loss})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    left = re.findall(r'class="label above train" style="left:([0-9.]+)%', text)
    assert len(left) == num_labels
    assert all(float(percent) < 70 for percent in left)


def test_a_long_run_of_many_layers_stays_small(tmp_path):
    run_dir = make_run(tmp_path / "long", num_steps=20_000, num_layers=48, sample="\x1b" * 5000)
    assert write_report(run_dir).stat().st_size < 500_000
    Page((run_dir / "report.html").read_text(encoding="utf-8"))


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run_dir = make_run(tmp_path / "run", num_steps=300)
    before = write_report(run_dir).read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == before
    assert not [p for p in run_dir.iterdir() if "report" in p.name and p.name != "report.html"]


def test_words():
    assert [compact(v) for v in (0, 950, 999.9, 12_345, 1_552_384, 2e9)] == ["0", "950", "1k", "12.3k", "1.55M", "2G"]
    assert [size(v) for v in (1, 12, 999_800, 405_780, 9_331_437)] == [
        "1 byte",
        "12 bytes",
        "1 MB",
        "406 kB",
        "9.33 MB",
    ]
    assert [duration(v) for v in (0.25, 45, 59.7, 314, 7380, 10**6)] == [
        "0.25 s", "45 s", "1 min 0 s", "5 min 14 s", "2 h 3 min", "11 days 13 h"]  # fmt: skip
    assert plain('"<\x1b\u202e') == "&quot;&lt;ESCU+202E"
    assert rich("a\u2028é\N{ZERO WIDTH JOINER}") == 'a<span class="unseen">U+2028</span>é\N{ZERO WIDTH JOINER}'


def test_ticks():
    assert nice_ticks(0, 1.55, 5) == [0, 0.5, 1, 1.5]
    assert nice_ticks(2.23, 8.3, 6) == [3, 4, 5, 6, 7, 8] or nice_ticks(2.23, 8.3, 6) == [4, 6, 8]
    assert nice_ticks(1, 1) == [1]
    assert log_ticks(0.9, 6.5) == [1, 2, 5]
    assert log_ticks(0.5, 12_000) == [1, 10, 100, 1000, 10_000]
    assert thin(10, 4).tolist() == [0, 3, 6, 9]
    assert thin(1, 4).tolist() == [0]
    assert thin(0, 4).tolist() == []


# what a run leaves


SETTINGS = {"max_steps": 4, "batch_size": 2, "seq_len": 16, "warmup_steps": 1, "device": "cpu", "validation_every": 2}
MODEL = HGRN2Config(vocab_size=257, hidden_size=16, num_hidden_layers=2, expand_ratio=8, intermediate_size=24)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"The {i}th story begins here, with a hero.\nAnd then it ends.\n" * 20)
    return prepare(folder, "bytes", folder.parent / "prepared")


def start(run_dir, data, display=None, **changes):
    return start_language_run(
        run_dir, MODEL, SETTINGS | changes, data, data_settings={}, display=display or PlainDisplay()
    )


class Notes(PlainDisplay):
    def __init__(self):
        super().__init__()
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.slow
def test_a_run_leaves_a_report_and_so_does_resuming(prepared, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    run = start(tmp_path / "run", prepared)
    assert run.report == tmp_path / "run" / "report.html"
    shown = Page(run.report.read_text(encoding="utf-8")).text()
    first = read_metrics(tmp_path / "run")[0]
    assert first["parameters"] == run.model.num_parameters()
    assert first["data"]["train"]["documents"] + first["data"]["validation"]["documents"] == 30
    assert first["data"]["validation"]["text_bytes"] == prepared.validation.num_text_bytes
    assert re.fullmatch(r"The \d+th story begins here,", first["prompt"])
    assert f"--prompt '{first['prompt']}'" in shown
    assert "--max-steps 8" in shown
    assert "finished" in shown
    run.report.unlink()
    # a picture is what a run can end without
    monkeypatch.setitem(sys.modules, "hgrn2.train.plots", None)
    display = Notes()
    run = resume_language_run(tmp_path / "run", prepared, changes={"max_steps": 6}, display=display, compressors=True)
    assert run.pictures == []
    assert any("no plots besides the report" in note for note in display.notes)
    shown = Page(run.report.read_text(encoding="utf-8")).text()
    assert "resumed" in shown
    bits = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "compressors"][-1]["bits_per_byte"]
    assert f"gzip -9 {bits['gzip -9']:.3f} and xz -9 {bits['xz -9']:.3f}" in shown


def test_a_stopped_run_leaves_a_report(prepared, tmp_path):
    import os
    import signal

    class Stopping(Notes):
        def train(self, record, progress, eta_s):
            if record["step"] == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    run = start(tmp_path / "run", prepared, Stopping())
    assert run.result.stopped_by == "SIGTERM"
    assert run.pictures == []
    shown = Page(run.report.read_text(encoding="utf-8")).text()
    assert "50% of the budget used" in shown
    assert "Finish the run" in shown
    assert "What the layers remember" in shown


def test_a_run_that_fails_leaves_a_report(prepared, tmp_path):
    with refuses("not-finite", "2 steps"):
        start(tmp_path / "run", prepared, learning_rate=1e30, warmup_steps=0, clip_norm=0.0, max_nonfinite=2,
              weight_decay=0.0)  # fmt: skip
    assert "skipped" in Page((tmp_path / "run" / "report.html").read_text(encoding="utf-8")).text()


def test_what_cannot_be_written_at_the_end_is_a_note(prepared, tmp_path, monkeypatch):
    def full(run_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hgrn2.train.ending.write_report", full)
    monkeypatch.setattr("hgrn2.train.plots.plot_run", full)
    display = Notes()
    run = start(tmp_path / "run", prepared, display)
    assert run.report is None
    assert run.pictures == []
    assert run.result.stopped_by is None
    for what in ("the report", "the plots"):
        (note,) = [note for note in display.notes if what in note]
        assert "No space left on device" in note
        assert f"hgrn2 plot {tmp_path / 'run'}" in note


def test_a_replaced_folder_gets_no_report(prepared, tmp_path, monkeypatch):
    """Another run's folder is left alone when this one fails."""
    run_dir = tmp_path / "run"

    def fail(self):
        self.has_started = True
        run_dir.rename(tmp_path / "removed")
        run_dir.mkdir()
        raise UserError("stopped")

    monkeypatch.setattr(Trainer, "run", fail)
    with pytest.raises(UserError, match="stopped"):
        start(run_dir, prepared)
    assert list(run_dir.iterdir()) == []


# what to do next


def test_first_words(tmp_path):
    wanted = {
        "Once upon a time there was a king.\n": "Once upon a time there",
        "   \n***\n\nChapter one of it\nx": "Chapter one of it",
        "def quote(s, *,  safe='/'):\n    pass\n": "def quote(s, *,  safe='/'):",
        "one\x1b[31m two three four": "one",
        "ab\n" * 50: "ab",
        "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 60: "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 12,
        "# - *\n--- === ***\n": "",
        "# -*- mode: python -*-\n\nimport sys\nfrom here import that\n": "from here import that",
    }
    for index, (text, prompt) in enumerate(wanted.items()):
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / "a.txt").write_text("some text to train on")
        (tmp_path / "b.txt").write_text(text)
        data = prepare(tmp_path / "t", "bytes", tmp_path / str(index), validation=tmp_path / "b.txt")
        found = first_words(data.validation, data.tokenizer)
        assert found == prompt
        assert found == found.strip()


def test_commands_are_called_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "my bin" / "hgrn2")])
    assert program() == f"'{tmp_path}/my bin/hgrn2'"
    monkeypatch.setattr(sys, "argv", ["-c"])
    assert program() == "hgrn2"
    assert generate_command(tmp_path / "a b", "it's") == f"hgrn2 generate '{tmp_path}/a b' --prompt 'it'\"'\"'s'"
    settings = {"max_steps": 1000, "max_time_s": 300, "max_tokens": None}
    assert (
        resume_command(tmp_path, settings, True) == f"hgrn2 train --resume {tmp_path} --max-steps 2000 --max-time-s 600"
    )
    assert resume_command(tmp_path, settings, False) == f"hgrn2 train --resume {tmp_path}"


def test_the_python_lines_of_a_report_run(prepared, tmp_path, capsys, monkeypatch):
    # takes longer than the rest, and is tested above
    monkeypatch.setattr("hgrn2.train.plots.plot_run", lambda run: [])
    run = start(tmp_path / "it's a run", prepared)
    page = Page(run.report.read_text(encoding="utf-8"))
    python = next("".join(data for tag, data in page.texts[i : i + 1]) for i, (tag, data) in enumerate(page.texts)
                  if tag == "code" and data.startswith("import hgrn2"))  # fmt: skip
    exec(compile(python, "report.html", "exec"), {})
    assert len(capsys.readouterr().out) > 20
