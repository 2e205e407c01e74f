"""What a signal does to a run, by where it meets it."""

import os
import signal
import subprocess
import sys

import pytest

from icet_jax.errors import StopRun
from icet_jax.training.signals import delay_signals, handle_signals


def test_outside_of_a_block_a_signal_ends_the_run_at_once_and_is_no_exception_that_others_catch():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopRun) as caught, handle_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:  # of a library
            pytest.fail("it was swallowed")
    assert caught.value.code == 75 and caught.value.line.startswith("SIGTERM: stopped")
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyboardInterrupt), handle_signals():
        os.kill(os.getpid(), signal.SIGINT)


def test_inside_of_a_block_it_is_noted(capsys):
    with handle_signals():
        with delay_signals() as request:
            assert not request.received()
            os.kill(os.getpid(), signal.SIGINT)
            assert request.received() and request.received() and request.reason == "SIGINT"
            assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert capsys.readouterr().err.count("SIGINT: stops after this step; a second one ends it at once") == 1


def test_a_second_signal_ends_the_process_at_once():
    program = """
import os, signal
from icet_jax.training.signals import delay_signals, handle_signals
with handle_signals(), delay_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGTERM and "still here" not in done.stdout
    assert "SIGTERM: stops after this step" in done.stderr
