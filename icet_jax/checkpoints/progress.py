"""Reports the progress of a long read or write of weights: bytes and time left, after some silent seconds."""

import sys
import time

import jax

_SILENT = 2.0  # seconds without output, in which most small checkpoints are done
_TERMINAL, _LOG = 0.2, 10.0  # seconds between two updates on a terminal and between two lines in a log


class ByteProgress:
    """Counts bytes of `what` on standard error; only the first of several processes prints."""

    def __init__(self, what: str, total: int):
        """Starts to count towards `total` bytes."""
        self._what, self._total, self._done = what, max(total, 1), 0
        self._began = self._last_print = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._prints = jax.process_index() == 0

    def advance(self, count: int) -> None:
        """Counts `count` more bytes and prints the progress if it is time."""
        self._done += count
        now = time.monotonic()
        pause = _TERMINAL if self._terminal else _LOG
        if (
            not self._prints
            or now - self._began < _SILENT
            or (now - self._last_print < pause and self._done < self._total)
        ):
            return
        self._last_print = now
        left = (now - self._began) * (self._total - self._done) / max(self._done, 1)
        line = f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {left:.0f} s left"
        if self._terminal:
            print(f"\r{line}\033[K", end="\n" if self._done >= self._total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr)
