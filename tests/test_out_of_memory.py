"""Too little memory, on a device or the host, compiling or running: one line, and the run's state stays."""

import errno
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from icet_jax import main as front_door
from icet_jax.algorithms.lppo import Lppo
from icet_jax.errors import during
from icet_jax.parallel.compilations import compile_programs
from icet_jax.parallel.distributed import describe
from icet_jax.runs import run_dir
from tests.runs import smoke

ALLOCATION = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.")
COMPILATION = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.46G of 15.48G "
    "hbm. Exceeded hbm capacity by 4.98G.\n\nTotal hbm usage >= 20.46G:\n  program 20.46G"
)
HOST = np._core._exceptions._ArrayMemoryError((1 << 31, 4), np.dtype(np.float32))


def failing(error):
    """A function that raises `error`, as a device or a compiler would."""

    def fail(*_, **__):
        raise error

    return fail


def printed(error, capsys, monkeypatch):
    """The line that the command ends with."""
    monkeypatch.setattr(front_door, "run", failing(error))
    assert front_door.main([]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("icet-jax: ") and shown.count("\n") == 1
    assert "What is finished stays: the same command goes on where there is more memory" in shown
    return shown


@pytest.mark.parametrize(
    ("phase", "error", "says"),
    [
        (
            "rollout",
            ALLOCATION,
            ["a device has not enough memory (asked for 16 GiB at once)", "config.data.batch_size"],
        ),
        ("update", ALLOCATION, ["a device has not enough memory (asked for 16 GiB", "config.lppo.accumulation"]),
        ("sweep before", HOST, ["the host has not enough memory (asked for 32.0 GiB at once)", "sweep.max_new_tokens"]),
        ("compiling update", COMPILATION, ["(needs 20.46G of 15.48G)", "config.lppo.accumulation", "config.mesh"]),
        ("loading the model", MemoryError(), ["the host has not enough memory; give a smaller config.model.dtype"]),
        ("export", OSError(errno.ENOMEM, "Cannot allocate memory"), ["the host has not enough memory", "config.mesh"]),
        ("judging", OverflowError("Python integer 9 out of bounds for int32"), ["larger than any can be", "judges"]),
    ],
)
def test_it_is_one_line_with_phase_need_and_fields(phase, error, says, capsys, monkeypatch):
    error.__notes__ = []
    with pytest.raises(type(error)), during(phase):
        raise error
    line = printed(error, capsys, monkeypatch)
    assert line.startswith(f"icet-jax: {phase}: ") and all(part in line for part in says)
    assert describe(error) == (line.removeprefix("icet-jax: ").rstrip(), 2)


def test_other_errors_keep_their_traceback(monkeypatch):
    for error in (jax.errors.JaxRuntimeError("INTERNAL: something else"), OverflowError("math range error")):
        monkeypatch.setattr(front_door, "run", failing(error))
        with pytest.raises(type(error)):
            front_door.main([])


def test_phases_of_a_run_are_named_from_the_outside_in(tmp_path, capsys, monkeypatch):
    program = SimpleNamespace(compile=failing(ALLOCATION))
    ALLOCATION.__notes__ = []
    with pytest.raises(jax.errors.JaxRuntimeError) as caught, run_dir.Costs(tmp_path).stage("sweep_before"):
        compile_programs([("decode", program)])
    line = printed(caught.value, capsys, monkeypatch)
    assert "icet-jax: sweep before: compiling decode: a device" in line and "config.sweep.batch_size (rows" in line


@pytest.mark.parametrize("size", ["2147483648", "100000000000000000000"])
def test_a_size_that_no_array_has_is_refused_by_its_field(size, capsys):
    assert front_door.main(["--mode=ask", "--checkpoint=organism:vlm", f"--config.sweep.max_new_tokens={size}"]) == 2
    assert capsys.readouterr().err.startswith(
        f"icet-jax: config.sweep.max_new_tokens is {size}, but must be below 2^31"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
def test_answers_that_no_memory_holds_end_a_sweep_in_one_line(tmp_path):
    command = [
        "bash", "-c", 'ulimit -v 16000000; exec "$@"', "bash", sys.executable, "-m", "icet_jax.main",
        "--mode=sweep", "--checkpoint=organism:vlm", f"--workdir={tmp_path}",
        "--config.sweep.datasets.mine=examples/prompts.csv", "--config.sweep.exits=1",
        "--config.sweep.max_new_tokens=100000000",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert last.startswith("icet-jax: sweep before: a device has not enough memory (asked for ")
    assert "config.sweep.batch_size" in last and "sweep.max_new_tokens" in last


def test_training_that_runs_out_of_memory_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    """The second iteration's update fails on the device; the same command then ends as if nothing had been."""
    command = smoke.arguments(
        tmp_path, lppo__iterations="2", checkpoint__every="1", sweep__utility="{}", sweep__exits="1",
        data__mixture="{'vqa': 1.0}", reward__by_kind="{'vqa': 'exact_match'}", sweep__scorers="refusal_keywords",
        sweep__datasets="{'benign': 'toy:benign'}",
    )  # fmt: skip
    own, calls = Lppo.finish, []

    def finish(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            object.__setattr__(self._phases, "update", failing(ALLOCATION))
        return own(self, *arguments)

    ALLOCATION.__notes__ = []
    monkeypatch.setattr(Lppo, "finish", finish)
    assert front_door.main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("icet-jax: train: update: a device has not enough memory (asked for 16 GiB at once); give a")
    assert front_door.main(command) == 0
    assert len(calls) == 3 and [row["step"] for row in smoke.rows(tmp_path)] == [1, 2]
