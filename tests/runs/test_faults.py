"""Six cases of the campaign in benchmarks/faults.py, in this process where nothing has to be killed."""

import contextlib
import functools
import io
import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import jax
import pytest

from benchmarks import faults
from icet_jax import main

pytest.importorskip("torch")


class Here(faults.Job):
    """The job in this process, told to stop instead of killed; what it is told after it has ended goes nowhere."""

    def run(self, file_limit=None):
        said, began = io.StringIO(), time.monotonic()
        before = signal.signal(signal.SIGTERM, lambda *_: None)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[0] if file_limit is None else file_limit, limits[1]))
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = main.main(self.arguments())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGTERM, before)
        return faults.End(code, time.monotonic() - began, said.getvalue())

    def disturbed(self, seconds, act, limit):
        self.ended, self.told = threading.Event(), False

        def disturb():
            if not self.ended.wait(seconds):
                act(self)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            return self.run()
        finally:
            self.ended.set()
            thread.join()

    def send_signal(self, number):
        if not self.told and not self.ended.is_set():
            self.told = True
            os.kill(os.getpid(), number)

    def stopped(self, ready, seconds):
        def wait(_):
            while not ready() and not self.ended.wait(0.01):
                pass
            self.send_signal(signal.SIGTERM)

        return self.disturbed(0.0, wait, faults.GRACE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an undisturbed run finds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Here(folder / "run", folder)
    end = job.run()
    assert end.code == 0, end.said
    files = [path.stat().st_size for path in job.workdir.rglob("*") if path.is_file()]
    faults.SIZE.update(bytes=sum(files), largest=max(files))
    return job.result()


KINDS = ("sigkill", "sigterm", "full_disk", "corrupt_checkpoint", "corrupt_shard", "corrupt_record")


@pytest.mark.parametrize("kind", KINDS)
def test_a_disturbed_run_ends_as_if_nothing_had_been(kind, undisturbed, tmp_path, monkeypatch):
    seed = random.randrange(10**6)
    # The process that is killed finds what this one has compiled.
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    job = Here(tmp_path / "run", Path(jax.config.jax_compilation_cache_dir or tmp_path))
    if kind == "sigkill":
        job.disturbed = functools.partial(faults.Job.disturbed, job)
    entry = faults.once(kind, seed, job, undisturbed, typical=5.0)
    assert entry["failure"] is None, entry
