"""SIGTERM and SIGINT: what a cluster sends before it takes a machine away, and Ctrl-C.

    with handled():                          # around a run that can be started again
        ...                                  # SIGTERM: `Stopped` is raised at once; SIGINT: KeyboardInterrupt
        with kept_waiting() as told:         # where something has to be saved first
            ...
            if told():                       # the same answer in every process
                save(); raise Stopped(f"{told.name}: ...")

A second signal ends the process at once, as if nobody had listened. What a run writes outlives even that.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from icet_jax.errors import Stopped

_HEARD = (signal.SIGTERM, signal.SIGINT)


class Told:
    """Whether the run has been told to stop; calling it asks all processes, which must do so together."""

    def __init__(self) -> None:
        self.name = "another process was told to stop"
        self._set = False

    def __call__(self) -> bool:
        """Whether any process has had a signal since the block began."""
        from icet_jax.parallel.distributed import any_of  # jax: signals are heard before it is there

        return any_of(self._set)

    def set(self, number: int) -> None:
        """Called by the signal's handler."""
        self.name, self._set = signal.Signals(number).name, True


_waiting: list[Told] = []  # the innermost block last


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Listens until the block ends. Outside of the main thread, where Python has no signals, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _heard) for number in _HEARD}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def kept_waiting() -> Iterator[Told]:
    """Inside, a signal is only noted; the block looks for it where it can stop."""
    told = Told()
    _waiting.append(told)
    try:
        yield told
    finally:
        _waiting.remove(told)


def _heard(number: int, frame: FrameType | None) -> None:
    for other in _HEARD:
        signal.signal(other, signal.SIG_DFL)
    if _waiting:
        _waiting[-1].set(number)
        name = signal.Signals(number).name
        print(f"icet-jax: {name}: stops after this step; a second one ends it at once", file=sys.stderr, flush=True)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise Stopped(f"{signal.Signals(number).name}: stopped; the same command goes on from what is written")
