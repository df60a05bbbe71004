import errno
import io
import sys

import pytest
from rich.console import Console

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
    assert lines[1] == "step 12  validation: loss 2.0000, perplexity 7.39 a token, 1.2500 bits a byte"
    assert "def [bold]f():" in lines
    assert lines[-1] == "a note [with brackets]"


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
        "1.2500 bits a byte",
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
