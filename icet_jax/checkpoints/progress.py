"""Prints the progress of reading or writing weights (bytes and seconds left) if it takes longer than a few seconds."""

import sys
import time

import jax

_QUIET_SECONDS = 2.0  # nothing is printed in the first seconds, in which most small checkpoints are finished
_TERMINAL_SECONDS, _LOG_SECONDS = 0.2, 10.0  # shortest time between two updates on a terminal, or two lines in a log


class ByteProgress:
    """Counts processed bytes and prints them to standard error; only the first process of a run prints."""

    def __init__(self, title: str, total: int):
        """Starts to count towards `total` bytes; `title` names the work, such as "loading weights"."""
        self._title, self._total, self._done = title, max(total, 1), 0
        self._began = self._last_print = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._prints = jax.process_index() == 0

    def advance(self, count: int) -> None:
        """Counts `count` more bytes, and prints the progress if the last print is long enough ago."""
        self._done += count
        now = time.monotonic()
        pause = _TERMINAL_SECONDS if self._on_terminal else _LOG_SECONDS
        is_early = now - self._began < _QUIET_SECONDS or (now - self._last_print < pause and self._done < self._total)
        if is_early or not self._prints:
            return
        self._last_print = now
        left = (now - self._began) * (self._total - self._done) / max(self._done, 1)
        line = f"{self._title}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {left:.0f} s left"
        if self._on_terminal:
            print(f"\r{line}\033[K", end="\n" if self._done >= self._total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr)
