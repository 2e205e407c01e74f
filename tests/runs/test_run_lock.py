"""One run at a time writes into a run directory, and nothing that ended keeps the next one out."""

import errno
import fcntl
import signal
import socket
import subprocess
import sys

import pytest

from icet_jax import main
from icet_jax.commands import align, sweep
from icet_jax.errors import UserError
from icet_jax.runs import common, config_files, run_dir, run_lock
from tests.runs import smoke

HOLD = """
import sys, time
from pathlib import Path
from icet_jax.runs.run_lock import locked
with locked(Path(sys.argv[1])):
    print("holds it", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def second_process(workdir, seconds=0.0):
    """A process that takes the lock, says so, and keeps it for a while."""
    return subprocess.Popen([sys.executable, "-c", HOLD, str(workdir), str(seconds)], stdout=-1, stderr=-1, text=True)


@pytest.fixture
def other(tmp_path):
    """Another process that writes into `tmp_path`."""
    process = second_process(tmp_path, 300.0)
    assert process.stdout.readline() == "holds it\n"
    yield process
    process.kill()
    process.communicate()


def refused(workdir):
    """What another process that wants the lock is told; empty where it gets the lock."""
    said, error = second_process(workdir).communicate(timeout=60)
    return "" if "holds it" in said else error.splitlines()[-1]


COMMANDS = {
    "align": ["--config=configs/organism_lppo.py"],
    "sweep": ["--checkpoint=organism:vlm", "--config.sweep.datasets.mine=examples/prompts.csv"],
    "reward": ["--config=configs/rm_gpt2.py:smoke"],
    "export": [],
}


@pytest.mark.parametrize("mode", COMMANDS)
def test_a_second_run_is_refused_and_told_who_writes(mode, other, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("icet_jax.parallel.compilations.keep_programs", lambda where: None)
    monkeypatch.setattr(common, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    if mode == "export":
        run_dir.claim(tmp_path, config_files.load(smoke.CONFIG, []))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main.main([f"--mode={mode}", f"--workdir={tmp_path}", *COMMANDS[mode]]) == 2
    line = capsys.readouterr().err
    who = f"another run (process {other.pid} on {socket.gethostname()}) is writing there; wait for it or "
    assert line.count("\n") == 1 and f"--workdir={tmp_path}: {who}" in line
    assert line.rstrip().endswith("give --out, a folder elsewhere" if mode == "export" else "choose another --workdir")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_run_keeps_nobody_out(other, tmp_path, monkeypatch):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / run_lock.NAME).exists()
    began = []
    monkeypatch.setattr("icet_jax.parallel.compilations.keep_programs", lambda where: None)
    monkeypatch.setattr(sweep, "measure", lambda config, workdir: began.append(refused(workdir)))
    assert main.main(["--mode=sweep", f"--workdir={tmp_path}", *COMMANDS["sweep"]]) == 0
    assert len(began) == 1 and "another run (process" in began[0]
    assert not (tmp_path / run_lock.NAME).exists() and refused(tmp_path) == ""


def test_calls_of_train_in_one_process_follow_each_other(tmp_path, monkeypatch):
    seen = []

    def rows(config, workdir):
        seen.append(refused(workdir))
        with pytest.raises(UserError, match="another run"):
            align.train(config, workdir)
        raise UserError("this is as far as the test goes")

    monkeypatch.setattr(common, "train_rows", rows)
    config = config_files.load(smoke.CONFIG, [])
    for _ in range(2):
        with pytest.raises(UserError, match="as far as the test goes"):
            align.train(config, tmp_path)
    assert len(seen) == 2 and all("another run (process" in line for line in seen)
    assert refused(tmp_path) == ""


def test_a_run_over_seeds_does_not_refuse_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(common.report, "build", lambda *_, **__: tmp_path)
    config = config_files.load(smoke.CONFIG, [("seeds", "1,2")])
    seen = []

    def run(single, folder):
        seen.append((folder.name, "another run" in refused(folder), "another run" in refused(tmp_path)))

    common.for_each_seed(config, tmp_path, run)
    assert seen == [("seed_1", True, True), ("seed_2", True, True)]


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with run_lock.locked(tmp_path):
        line = capsys.readouterr().err
    assert line.count("\n") == 1 and f"--workdir={tmp_path}: its file system has no locks" in line
