import errno
import io
import re
import sys

import pytest
from rich.console import Console, ConsoleDimensions

from hgrn2.data.progress import announce
from hgrn2.train.display import LiveDisplay, PlainDisplay, duration, make_display, size

RECORD = {
    "step": 12,
    "tokens": 123_456,
    "loss": None,
    "smoothed_loss": 2.5,
    "learning_rate": 1e-3,
    "tokens_per_s": 4321.0,
    "memory_bytes": 3 * 2**29,
    "skipped_steps": 2,
}
VALIDATION = {"step": 12, "val_loss": 2.0, "val_perplexity": 7.389, "val_bits_per_byte": 1.25}


def show(display):
    with display:
        display.train(RECORD, 0.25, 95.0)
        display.validation(VALIDATION)
        display.sample({"step": 12, "text": "def [bold]f():\n    return 1"})
        display.note("a note [with brackets]")


def test_plain_lines(capsys):
    show(PlainDisplay())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "step 12   25%  loss 2.5000  lr 1.00e-03  4,321 tokens/s  left 1:35  1.5 GiB  skipped 2"
    assert lines[1] == "step 12  validation: loss 2.0000, perplexity 7.39 per token, 1.2500 bits per byte"
    assert "def [bold]f():" in lines
    assert lines[-1] == "a note [with brackets]"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_task_on_images_counts_images(capsys, is_terminal):
    file = io.StringIO()
    show(make_display(Console(file=file, force_terminal=is_terminal, width=100, color_system=None), counted="images"))
    text = file.getvalue() + capsys.readouterr().err
    assert "images/s" in text
    assert "tokens" not in text.replace("per token", "")


def test_plain_training_lines_are_rationed(capsys):
    display = PlainDisplay(every_s=1000.0)
    for _ in range(5):
        display.train(RECORD, 0.5, None)
    display.train(RECORD | {"smoothed_loss": None}, 1.0, 0.0)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "left ?" in lines[0]
    assert "loss not finite" in lines[1]


def test_live_display_shows_everything():
    file = io.StringIO()
    show(LiveDisplay(Console(file=file, force_terminal=True, width=100, color_system=None)))
    text = file.getvalue()
    for part in (
        "123,456",
        "not finite",
        "2.5000",
        "1.5 GiB",
        "left 1:35",
        "1.2500 bits per byte",
        "def [bold]f():",
    ):
        assert part in text, part
    assert "a note [with brackets]" in text


class Gone(io.StringIO):
    """A terminal that is gone after some writes, or a pipe whose reader is."""

    def __init__(self, error, num_writes=0):
        super().__init__()
        self.error, self.num_left = error, num_writes

    def write(self, text):
        self.num_left -= 1
        if self.num_left < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(errno.EIO, "Input/output error")])
def test_a_reader_that_has_gone_stops_nothing(error, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone(error))
    show(PlainDisplay(every_s=0.0))


@pytest.mark.parametrize("num_writes", [0, 1, 2])
def test_a_terminal_that_has_gone_stops_nothing(num_writes):
    file = Gone(OSError(errno.EIO, "Input/output error"), num_writes)
    show(LiveDisplay(Console(file=file, force_terminal=True, width=100, color_system=None)))
    assert file.num_left < 0


def test_control_characters_do_not_reach_the_terminal(capsys):
    PlainDisplay().sample({"step": 1, "text": "a\x1b[2Jb\tc\r\x07"})
    assert "a\ufffd[2Jb\tc\ufffd\ufffd" in capsys.readouterr().err


def test_the_terminal_decides():
    assert isinstance(make_display(Console(file=io.StringIO(), force_terminal=True)), LiveDisplay)
    assert isinstance(make_display(Console(file=io.StringIO())), PlainDisplay)


def test_units():
    assert [duration(s) for s in (None, 0, 65, 3723)] == ["?", "0:00", "1:05", "1:02:03"]
    assert [size(n) for n in (0, 900, 5 * 2**20, 2**30, 2**51)] == ["0 B", "900 B", "5.0 MiB", "1.0 GiB", "2,048.0 TiB"]


class Screen:
    """The rows that a terminal shows of what is written; it wraps long rows when it becomes narrower, as most do."""

    def __init__(self, width):
        self.width, self.rows, self.row, self.column = width, [""], 0, 0

    def narrow(self, width):
        rows = [[row[j : j + width] for j in range(0, max(len(row), 1), width)] for row in self.rows]
        within = min(self.column, max(len(self.rows[self.row]) - 1, 0))
        self.row, self.column = sum(map(len, rows[: self.row])) + within // width, within % width
        self.rows, self.width = [row for some in rows for row in some], width

    def write(self, text):
        for word in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|.|\n", text):
            if word == "\n":
                self.row, self.column = self.row + 1, 0
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif word == "\r":
                self.column = 0
            elif word == "\x1b[1A":
                self.row -= 1
            elif word == "\x1b[2K":
                self.rows[self.row] = ""
            elif not word.startswith("\x1b"):
                row = self.rows[self.row].ljust(self.column)
                self.rows[self.row] = row[: self.column] + word + row[self.column + 1 :]
                self.column += 1

    def flush(self):
        pass


@pytest.mark.parametrize("narrower", [50, 40, 79])
def test_a_narrower_terminal_keeps_one_panel(narrower, monkeypatch):
    screen = Screen(80)
    console = Console(file=screen, force_terminal=True, color_system=None)
    monkeypatch.setattr(type(console), "size", property(lambda self: ConsoleDimensions(screen.width, 24)))
    display = LiveDisplay(console)
    display._live.auto_refresh = False
    with display:
        display.note("a note")
        display.train(RECORD, 0.25, 95.0)
        display.sample({"step": 12, "text": "a long line of text, " * 10})
        display._live.refresh()
        screen.narrow(narrower)
        display._live.refresh()
        screen.narrow(narrower - 5)
        display.note("another note")
        display.train(RECORD | {"step": 13}, 0.5, 95.0)
    shown = "\n".join(screen.rows)
    assert screen.rows[0] == "a note"
    assert screen.rows[1] == "another note"
    assert shown.count("training") == shown.count("step ") == shown.count("╭") == shown.count("╰") == 1
    for whole in ("learning rate", "1.00e-03", "skipped steps", "123,456"):
        assert whole in shown
    assert max(map(len, screen.rows)) <= narrower - 5


def test_news_break_between_words(capsys, monkeypatch):
    news = "prepared runs/prepared/notes: 56,616 training tokens (28 documents), tokenizer bytes with 257 tokens"
    announce(news)
    assert capsys.readouterr().err == f"{news}\n"
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    announce(f"{news}\x1b")
    rows = capsys.readouterr().err.splitlines()
    assert max(map(len, rows)) <= 30
    assert " ".join(rows) == f"{news}\ufffd"
