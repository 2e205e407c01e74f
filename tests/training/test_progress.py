"""Progress on a terminal and in a pipe."""

import io
import sys

import pytest

from icet_jax.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        raise io.UnsupportedOperation


@pytest.fixture
def on_terminal(monkeypatch):
    """Function that makes standard error a terminal and returns it; pytest replaces it after the fixtures."""

    def on_terminal():
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return on_terminal


def screen(written):
    """The lines that remain on a screen: a carriage return goes back to the beginning of its line."""
    lines = []
    for line in written.replace("\x1b[A", "").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return [line for line in lines if line]


def test_messages_appear_above_the_bar_and_in_one_piece(on_terminal):
    terminal = on_terminal()
    with Progress("work", 4) as progress:
        progress.advance({"loss": 1.5})
        print("a message", "of several words", file=sys.stderr)
        sys.stderr.write("another one, ")
        progress.advance()
        sys.stderr.write("in two parts\n")
        progress.advance(to=4)
    assert sys.stderr is terminal
    *messages, bar = screen(terminal.getvalue())
    assert messages == ["a message of several words", "another one, in two parts"]
    assert bar.startswith("work: 100%") and "4/4" in bar


def test_bars_within_each_other_share_the_terminal(on_terminal):
    terminal = on_terminal()
    with Progress("outer", 2) as outer, Progress("inner", 1) as inner:
        inner.advance()
        print("hello", file=sys.stderr)
        outer.advance()
    assert sys.stderr is terminal and "\rhello\n" in terminal.getvalue().replace("\x1b[A", "")


def test_an_unfinished_line_is_not_lost(on_terminal):
    terminal = on_terminal()
    with pytest.raises(ValueError, match="stop"), Progress("work", 2):
        sys.stderr.write("half a line")
        raise ValueError("stop")
    assert sys.stderr is terminal and terminal.getvalue().endswith("half a line")


def test_a_pipe_gets_ten_lines_and_its_messages_as_they_are(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with Progress("work", 200) as progress:
        for step in range(200):
            progress.advance({"loss": 1 / (step + 1)})
        print("a message", file=sys.stderr)
    lines = pipe.getvalue().splitlines()
    assert len(lines) == 11 and lines[-1] == "a message" and lines[0].startswith("work: 20/200, loss 0.05, ")
