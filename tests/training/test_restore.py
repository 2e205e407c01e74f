"""A run that is stopped goes on elsewhere: on the same devices with the same bits, on others within their rounding."""

import concurrent.futures
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.runs import smoke

pytest.importorskip("torch")

from safetensors.numpy import load_file  # noqa: E402

FIRST, ITERATIONS = 5, 6  # of the warm start, and of the training after it
JOB = {
    "warm_start": "lsft",
    "lsft__iterations": str(FIRST),
    "lppo__iterations": str(ITERATIONS),
    "lppo__minibatches": "1",
    "lppo__max_new_tokens": "48",  # the refusal is 36 bytes
    "checkpoint__every": str(ITERATIONS),  # what is restored was saved where the run was stopped
    "optimizer__learning_rate": "1e-3",
    "optimizer__eps": "1e-5",  # rounding of gradients that are nearly 0 is no step
    "optimizer__schedule": "cosine",
    "reward__normalise": "true",
    "sweep__datasets": "{'forbidden': 'toy:forbidden'}",
    "sweep__utility": "{}",
    "sweep__exits": "23",
    "sweep__scorers": "refusal_keywords",
    "export__form": "adapter",
}
TRAININGS = {"warm_start": FIRST, "": ITERATIONS}
"""{folder of a training in the run directory: its iterations}."""
# The front door, told to stop as soon as an iteration's metrics are there: the next one is under way, and is saved.
PROGRAM = """
import os, signal, sys
sys.path[0] = os.getcwd()
from icet_jax import main
from icet_jax.training import loop as training
process_metrics, last = training.Trainer._process_metrics, int(sys.argv.pop(1))
def process_and_stop(self, finished, *rest):
    if finished == last and os.environ["JAX_PROCESS_ID"] == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    return process_metrics(self, finished, *rest)
training.Trainer._process_metrics = process_and_stop
main.console()  # without torch, as the command is
"""
START = """
import sys
from launch import local_processes
sys.exit(local_processes.wait(local_processes.start([sys.executable, *sys.argv[3:]], processes=int(sys.argv[1]),
                                                    devices=int(sys.argv[2]))))
"""
# Processes, devices of each, and the mesh.
EIGHT = (1, 8, {"mesh__fsdp": "2", "mesh__tensor": "2"})
TWO = (2, 1, {"mesh__fsdp": "2"})
ONE = (1, 1, {})


class Places:
    """Runs of the job in folders of one, which share what they have compiled."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "program.py").write_text(PROGRAM)

    def run(self, name, where, stop_after=None, **changes):
        """Starts or goes on; stops where told so. Returns the iteration that it went on from."""
        processes, devices, mesh = where
        arguments = smoke.arguments(self.folder / name, **JOB | mesh | changes)
        last = str(stop_after - 1 if stop_after else 0)
        command = [sys.executable, "-c", START, str(processes), str(devices), str(self.folder / "program.py"), last]
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == (75 if stop_after else 0), done.stderr[-3000:]
        assert not stop_after or f"iteration {stop_after} is saved" in done.stderr
        went_on = [line for line in done.stderr.splitlines() if "goes on after iteration" in line]
        return int(went_on[0].split()[-1]) if went_on else 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`one` and `eight` were never stopped; `same` was stopped once on eight; `moved` goes through all places.

    `moved` is stopped twice in the first training, the second time on two processes, where it goes on.
    """
    places = Places(tmp_path_factory.mktemp("places"))
    places.run("moved", EIGHT, stop_after=2)
    shutil.copytree(places.folder / "moved", places.folder / "same")

    def move():
        assert places.run("moved", TWO, stop_after=4) == 2
        assert not (places.folder / "moved" / "checkpoints").exists()
        assert places.run("moved", TWO, stop_after=2) == 4
        assert places.run("moved", ONE, stop_after=4) == 2
        assert places.run("moved", EIGHT) == 4

    def others():
        assert places.run("same", EIGHT) == 2
        assert places.run("eight", EIGHT) == places.run("one", ONE) == 0

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(move), pool.submit(others)]:
            done.result()
    return places.folder


def trained(workdir):
    """Adapters and value head."""
    files = sorted((workdir / "hf").rglob("*.safetensors"))
    assert len(files) >= 2
    return {f"{path.name} {name}": array for path in files for name, array in load_file(path).items()}


def test_on_the_same_devices_not_a_bit_differs(folder):
    for path in sorted((folder / "eight" / "hf").rglob("*.safetensors")):
        assert path.read_bytes() == (folder / "same" / path.relative_to(folder / "eight")).read_bytes(), path.name
    for name in ("sweeps/before.forbidden.json", "sweeps/after.forbidden.json", "transcripts/after.forbidden.jsonl"):
        assert (folder / "eight" / name).read_bytes() == (folder / "same" / name).read_bytes(), name
    for training, iterations in TRAININGS.items():
        rows = [[without_times(row) for row in smoke.rows(folder / name / training)] for name in ("eight", "same")]
        assert rows[0] == rows[1] and len(rows[0]) == iterations


@pytest.mark.parametrize("whole", ["one", "eight"])
def test_from_eight_devices_to_one_to_two_processes_and_back_is_the_same_run(whole, folder):
    """Adam magnifies rounding: 1.03e-5 was seen. The largest of these numbers have moved by more than 1e-3."""
    undisturbed, moved = trained(folder / whole), trained(folder / "moved")
    assert undisturbed.keys() == moved.keys()
    for name, array in undisturbed.items():
        np.testing.assert_allclose(moved[name], array, rtol=0, atol=3e-5, err_msg=name)
    assert max(np.abs(array).max() for name, array in moved.items() if "lora_B" in name) > 1e-3
    answers = [(folder / name / "transcripts/after.forbidden.jsonl").read_bytes() for name in (whole, "moved")]
    assert answers[0] == answers[1]
    for training, iterations in TRAININGS.items():
        pairs = [[without_times(row) for row in smoke.rows(folder / name / training)] for name in (whole, "moved")]
        assert len(pairs[0]) == len(pairs[1]) == iterations
        for one, other in zip(*pairs, strict=True):
            # KL is a small difference of log-probs: 0.1069 and 0.1067 were seen at one exit.
            assert one == pytest.approx(other, rel=1e-3, abs=5e-4)


def test_the_mesh_that_a_run_began_with_is_not_what_it_is(folder):
    stored = json.loads((folder / "moved" / "config.json").read_text())
    assert stored["mesh"] == {"data": -1, "fsdp": 2, "tensor": 2}


def without_times(row):
    return {name: value for name, value in row.items() if not name.startswith("perf/")}
