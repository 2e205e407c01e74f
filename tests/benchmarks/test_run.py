"""The benchmarks run, at the smallest size, and what they compare agrees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("rollout", ["--batches", "1,3", "--repeats", "1"]),
        ("update_vs_torch", ["--pairs", "1"]),
        ("sweep_vs_transformers", ["--pairs", "1", "--prompts", "5", "--exits", "3", "--slots", "8"]),
        ("scaling", ["--only", "exits", "--pairs", "1"]),
    ],
)
def test_a_benchmark_runs(tmp_path, name, flags):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--out", str(tmp_path), "--preset", "tiny"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=600, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    found = json.loads(file.read_text())
    if name == "update_vs_torch":
        assert found["agreement"]["loss"] < 1e-5 and found["agreement"]["gradients"] < 1e-4
    if name == "sweep_vs_transformers":
        assert found["agreement"]["different"] == 0 and found["agreement"]["equal"] > 10
    if name == "scaling":
        calls = {line["encoder_calls"] for line in found["exits"]}
        assert len(found["exits"]) == 3 and len(calls) == 1, "the encoder's work does not grow with the exits"


def test_the_parts_of_run_all_say_what_to_type():
    script = str(ROOT / "benchmarks" / "run_all.sh")
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--part=N with N from 1 to 6" in done.stderr
