"""Says how far a long read or write of weights is: nothing in the first seconds, then bytes and the time left."""

import sys
import time

import jax

_SILENT = 2.0  # seconds in which most small checkpoints are done
_TERMINAL, _LOG = 0.2, 10.0  # seconds between two updates: of a line on a terminal, of lines in a log


class ByteProgress:
    """Counts bytes of `what` on stderr; only the first of several processes speaks."""

    def __init__(self, what: str, total: int):
        """`total`: bytes until done."""
        self._what, self._total, self._done = what, max(total, 1), 0
        self._began = self._said = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._speaks = jax.process_index() == 0

    def advance(self, count: int) -> None:
        """`count` bytes more are done."""
        self._done += count
        now = time.monotonic()
        pause = _TERMINAL if self._terminal else _LOG
        if not self._speaks or now - self._began < _SILENT or (now - self._said < pause and self._done < self._total):
            return
        self._said = now
        left = (now - self._began) * (self._total - self._done) / max(self._done, 1)
        line = f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {left:.0f} s left"
        if self._terminal:
            print(f"\r{line}\033[K", end="\n" if self._done >= self._total else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr)
