"""Killed with SIGKILL and restarted, a run ends with the same bits as one that was never killed."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.runs import smoke

ITERATIONS = 8
DEADLINE = 600  # seconds; only a hang gets there


JOB = {
    "lppo__iterations": str(ITERATIONS),
    "checkpoint__every": "3",
    "reward__normalise": "true",
    "optimizer__schedule": "cosine",
    "optimizer__warmup_steps": "2",
    "optimizer__learning_rate": "1e-3",
    "sweep__utility": "{}",
}
WARM_START = JOB | {
    "warm_start": "lsft",
    "lsft__iterations": str(ITERATIONS),
    "lppo__max_new_tokens": "48",  # the refusal is 36 bytes
    "sweep__datasets": "{'forbidden': 'toy:forbidden'}",
    "sweep__exits": "23",
    "sweep__scorers": "refusal_keywords",
}


def start(workdir, cache, job=JOB):
    arguments = smoke.arguments(workdir, **job)
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "icet_jax.main", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(workdir, cache, job=JOB):
    process = start(workdir, cache, job)
    _, printed = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, printed


def kill_after(workdir, cache, rows, delay, job=JOB, log="metrics.jsonl"):
    """Kills a run `delay` seconds after its file `log` has `rows` rows (0: after its first answer is written)."""
    process = start(workdir, cache, job)
    path = workdir / log
    began = time.monotonic()
    while time.monotonic() - began < DEADLINE and process.poll() is None:
        if rows == 0 and any(file.stat().st_size for file in workdir.glob("transcripts/*.jsonl")):
            break
        if rows and path.exists() and path.read_bytes().count(b"\n") >= rows:
            break
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compiled programs, shared by the processes: the point is where they stop, not what they compile."""
    return tmp_path_factory.mktemp("compiled")


def test_killed_at_three_random_points_a_run_ends_with_the_same_bits(tmp_path, cache):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, cache)
    seed = random.randrange(10**6)
    print(f"kills drawn with seed {seed}")  # shown if the test fails
    rng = random.Random(seed)
    for rows in (0, *sorted(rng.sample(range(1, ITERATIONS), 2))):
        kill_after(killed, cache, rows, rng.uniform(0, 0.2))
    assert not (killed / "report.html").exists()
    finish(killed, cache)

    for name in ("hf/model.safetensors", "hf/value_head.safetensors"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    for name in ("after.forbidden", "before.benign", "difference.forbidden"):
        assert (whole / f"sweeps/{name}.json").read_bytes() == (killed / f"sweeps/{name}.json").read_bytes(), name
    rows = [[without_times(row) for row in smoke.rows(workdir)] for workdir in (whole, killed)]
    assert rows[0] == rows[1] and len(rows[0]) == ITERATIONS


def test_killed_in_both_trainings_of_a_warm_start_a_run_ends_with_the_same_bits(tmp_path, cache):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, cache, WARM_START)
    kill_after(killed, cache, 4, 0.0, WARM_START, "warm_start/metrics.jsonl")
    assert not (killed / "metrics.jsonl").exists()
    kill_after(killed, cache, 4, 0.0, WARM_START)
    first = (killed / "warm_start" / "metrics.jsonl").read_bytes()
    finish(killed, cache, WARM_START)

    assert (killed / "warm_start" / "metrics.jsonl").read_bytes() == first
    for name in ("hf/model.safetensors", "hf/value_head.safetensors", "sweeps/after.forbidden.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    for folder in ("", "warm_start"):
        rows = [[without_times(row) for row in smoke.rows(workdir / folder)] for workdir in (whole, killed)]
        assert rows[0] == rows[1] and len(rows[0]) == ITERATIONS
    assert "L-SFT, then L-PPO" in (whole / "report.html").read_text()
    assert "| Warm start | L-SFT (supervised refusals" in (whole / "hf" / "README.md").read_text()


def without_times(row):
    return {name: value for name, value in row.items() if not name.startswith("perf/")}
