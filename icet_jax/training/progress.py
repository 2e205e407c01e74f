"""Shows progress on standard error: a bar with the time left on a terminal, a line now and then elsewhere."""

import io
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, cast

from tqdm import tqdm

_LINES = 10  # most lines that are printed from the first step to the last if there is no terminal


class _AboveBars(io.TextIOBase):
    """Writes whole lines to a terminal above the bars that tqdm draws there; the rest of a line waits for its end."""

    def __init__(self, terminal: Any) -> None:
        """Remembers the terminal, which the bars are drawn on too."""
        self.terminal, self._waiting = terminal, ""

    def write(self, text: str) -> int:
        """Writes the lines that `text` completes, and returns the number of its characters."""
        self._waiting += text
        lines, newline, self._waiting = self._waiting.rpartition("\n")
        if newline:
            with tqdm.external_write_mode(file=self.terminal):
                self.terminal.write(lines + newline)
        return len(text)

    def close_line(self) -> None:
        """Writes what still waits for the end of its line."""
        self.terminal.write(self._waiting)
        self._waiting = ""

    def flush(self) -> None:
        """Flushes the terminal."""
        self.terminal.flush()

    def isatty(self) -> bool:
        """Returns whether the terminal is one."""
        return bool(self.terminal.isatty())

    def fileno(self) -> int:
        """Returns the terminal's file descriptor."""
        return int(self.terminal.fileno())


class Progress:
    """Counts the steps of some work, shows the newest metrics beside them, and estimates the time left.

    While it is open, what is written to standard error on a terminal appears above the bar.
    """

    def __init__(self, what: str, total: int, *, start: int = 0):
        """Shows the step that the work begins with.

        Args:
          what: name of the work.
          total: number of steps, including those of earlier processes.
          start: number of steps that earlier processes have completed.
        """
        self._what, self._total, self._start, self._completed = what, total, start, start
        self._start_time = time.monotonic()
        terminal = sys.stderr.terminal if isinstance(sys.stderr, _AboveBars) else sys.stderr
        self._bar = tqdm(
            total=total, initial=start, desc=what, file=terminal, disable=not terminal.isatty(), dynamic_ncols=True
        )
        self._above: _AboveBars | None = None

    def advance(self, metrics: Mapping[str, float] | None = None, *, to: int | None = None) -> None:
        """Shows that `to` steps are completed (None: one more than before), and the `metrics` beside that."""
        shown = {name: f"{value:.3g}" for name, value in (metrics or {}).items()}
        before, self._completed = self._completed, self._completed + 1 if to is None else to
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(self._completed - before)
            return
        is_next_tenth = (self._completed * _LINES) // self._total > (before * _LINES) // self._total
        if self._completed == self._total or is_next_tenth:
            count = f"{self._completed}/{self._total}"
            values = "".join(f", {name} {value}" for name, value in shown.items())
            print(f"{self._what}: {count}{values}, {self.seconds_left():.0f} s left", file=sys.stderr)

    def seconds_left(self) -> float:
        """Returns the expected seconds until the last step, from the speed of this process so far."""
        seconds_per_step = (time.monotonic() - self._start_time) / max(self._completed - self._start, 1)
        return seconds_per_step * (self._total - self._completed)

    def __enter__(self) -> "Progress":
        if not self._bar.disable and not isinstance(sys.stderr, _AboveBars):
            self._above = _AboveBars(sys.stderr)
            sys.stderr = cast(Any, self._above)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._above is not None:
            self._above.close_line()
            if cast(Any, sys.stderr) is self._above:
                sys.stderr = self._above.terminal
