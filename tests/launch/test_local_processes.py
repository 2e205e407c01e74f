"""A whole run on two processes is the run on one: same answers and scores, same parameters."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.runs import smoke

pytest.importorskip("torch")

from safetensors.numpy import load_file  # noqa: E402

SHORT = {
    "lppo__iterations": "2",
    "sweep__datasets": "{'forbidden': 'toy:forbidden'}",
    "sweep__utility": "{}",
    "sweep__exits": "1,23",
}


def align(folder, processes, devices, **changes):
    command = [sys.executable, "launch/local_processes.py", f"--processes={processes}", f"--devices={devices}", "--"]
    command += smoke.arguments(folder, **SHORT, **changes)
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path_factory.mktemp(f"on_{processes}")
        done = align(folders[processes], processes, 2 // processes)
        assert done.returncode == 0, done.stderr[-3000:]
    return folders


def test_the_sweeps_are_equal(folders):
    one, two = folders[1], folders[2]
    names = sorted(
        str(path.relative_to(one)) for kind in ("sweeps", "transcripts") for path in (one / kind).rglob("*.json*")
    )
    assert {"sweeps/before.forbidden.json", "sweeps/after.forbidden.json", "transcripts/after.forbidden.jsonl"} <= {
        *names
    }
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_the_parameters_are_equal(folders):
    one, two = (load_file(folder / "hf" / "model.safetensors") for folder in folders.values())
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], atol=1e-6, err_msg=name)


def test_the_metrics_are_equal(folders):
    one, two = (smoke.rows(folder) for folder in folders.values())
    assert [row["step"] for row in two] == [1, 2]
    for mine, other in zip(two, one, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            if not name.startswith("perf/"):
                assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name


def test_one_process_writes(folders):
    one, two = ({path.name for path in folder.iterdir()} for folder in folders.values())
    assert one == two
    assert len(list((folders[2] / "scores").rglob("*.jsonl"))) == len(list((folders[1] / "scores").rglob("*.jsonl")))
    content = json.loads((folders[2] / "cost.json").read_text())
    assert {"sweep_before", "train", "export"} <= {phase["name"] for phase in content["phases"]}


def test_bad_input_is_one_line_and_its_code(folders):
    done = align(folders[2], 2, 1, reward__model="toy:no_such_model")
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "holds a run of another config" in line]
    # Both processes see it; the other may be ended before it has said so.
    assert 1 <= len(lines) <= 2 and lines[0].startswith("icet-jax: ") and "ends with process 0" in done.stderr
    assert "Traceback" not in done.stderr
