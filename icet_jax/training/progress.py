"""Progress: a bar with the time left on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

_LINES = 10  # at most this many lines per stretch where there is no terminal


class Progress:
    """Counts `total` steps of `what`, shows the newest numbers and estimates the time left."""

    def __init__(self, what: str, total: int, *, start: int = 0):
        self._what, self._total, self._start, self._done = what, total, start, start
        self._began = time.monotonic()
        self._bar = tqdm(total=total, initial=start, desc=what, disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def advance(self, numbers: Mapping[str, float] | None = None, *, to: int | None = None) -> None:
        """To step `to`, one further if None; `numbers` are shown beside the bar."""
        shown = {name: f"{value:.3g}" for name, value in (numbers or {}).items()}
        before, self._done = self._done, self._done + 1 if to is None else to
        if not self._bar.disable:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(self._done - before)
        elif self._done == self._total or (self._done * _LINES) // self._total > (before * _LINES) // self._total:
            values = "".join(f", {name} {value}" for name, value in shown.items())
            print(
                f"{self._what}: {self._done}/{self._total}{values}, {self.seconds_left():.0f} s left", file=sys.stderr
            )

    def seconds_left(self) -> float:
        """Estimate from the pace of this process."""
        pace = (time.monotonic() - self._began) / max(self._done - self._start, 1)
        return pace * (self._total - self._done)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
