"""Shows progress on standard error: a bar with the time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

_LINES = 10  # most lines that are printed from the first step to the last if there is no terminal


class Progress:
    """Counts the steps of some work, shows the newest metrics beside them, and estimates the time left."""

    def __init__(self, what: str, total: int, *, start: int = 0):
        """Shows the step that the work begins with.

        Args:
          what: name of the work.
          total: number of steps, including those of earlier processes.
          start: number of steps that earlier processes have completed.
        """
        self._what, self._total, self._start, self._completed = what, total, start, start
        self._start_time = time.monotonic()
        self._bar = tqdm(total=total, initial=start, desc=what, disable=not sys.stderr.isatty(), dynamic_ncols=True)

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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
