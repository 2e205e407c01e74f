"""Handles SIGTERM, which a cluster sends before it takes a machine away, and SIGINT, which is Ctrl-C.

    with handle_signals():                   # around a run that can be started again
        ...                                  # SIGTERM raises `StopRun` at once, SIGINT raises KeyboardInterrupt
        with delay_signals() as request:     # around work that must be saved before the run stops
            ...
            if request.received():           # the same answer in every process
                save(); raise StopRun(f"{request.reason}: ...")

A second signal ends the process at once, as if there were no handler. The files of a run stay usable even then.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from icet_jax.errors import StopRun

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Records whether the run has been asked to stop since a `delay_signals` block began.

    Attributes:
      reason: the name of the signal or, if another process received it, a sentence that says so.
    """

    def __init__(self) -> None:
        self.reason = "another process was told to stop"
        self._has_signal = False

    def received(self) -> bool:
        """Returns whether any process of the run has received a signal. All processes must call this together."""
        from icet_jax.parallel.distributed import any_of  # late, because signals are handled before jax is imported

        return any_of(self._has_signal)

    def record(self, number: int) -> None:
        """Records the signal `number`; the signal handler calls this."""
        self.reason, self._has_signal = signal.Signals(number).name, True


_open_requests: list[StopRequest] = []  # one per open `delay_signals` block, the innermost last


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Handles SIGTERM and SIGINT as the module's docstring describes, until the block ends.

    In another thread than the main thread it does nothing, because Python delivers signals to the main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier_handlers = {number: signal.signal(number, _on_signal) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def delay_signals() -> Iterator[StopRequest]:
    """Yields a `StopRequest`. During the block a signal is only recorded in it, so that the block can stop in order."""
    request = StopRequest()
    _open_requests.append(request)
    try:
        yield request
    finally:
        _open_requests.remove(request)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Handles the first signal and restores the default handlers, so that a second one ends the process."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    if _open_requests:
        _open_requests[-1].record(number)
        name = signal.Signals(number).name
        print(f"icet-jax: {name}: stops after this step; a second one ends it at once", file=sys.stderr, flush=True)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise StopRun(f"{signal.Signals(number).name}: stopped; the same command goes on from what is written")
