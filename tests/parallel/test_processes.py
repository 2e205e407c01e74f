"""Processes of one run agree, hold each their own rows of a batch, and end together."""

import errno
import os
import subprocess
import sys
import time

import pytest

from icet_jax.errors import StopRun, UserError
from icet_jax.parallel import distributed
from icet_jax.parallel.distributed import Address, Share, describe, find_address
from launch import local_processes

START = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
from pathlib import Path
import jax, numpy as np
from icet_jax import files
from icet_jax.errors import UserError
from icet_jax.parallel import distributed
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import batch_sharding, place_rows
distributed._GRACE_SECONDS = 0.5
with distributed.join_processes(None, None, None):
    index = jax.process_index()
    folder = Path(sys.argv[1])
"""
AGREE = """
    assert (jax.process_count(), jax.device_count(), distributed.is_writer()) == (2, 4, index == 0)
    assert distributed.agree([index, "word"]) == [0, "word"]
    assert distributed.gather({"index": index}) == [{"index": 0}, {"index": 1}]
    assert distributed.any_of(index == 1) and not distributed.any_of(False)
    assert distributed.on_first(lambda: distributed.gather(index)) == [0], "the first is by itself there"
    for number in range(150):
        assert distributed.agree(number if index == 0 else None) == number
    assert len(distributed._own_keys) < 110
    with distributed.first_before_others():
        if index == 0:
            time.sleep(0.3)
            files.write_text_atomic(folder / "made", "by the first")
        assert (folder / "made").read_text() == "by the first"
        files.write_text_atomic(folder / f"by_{index}", "")
    print("only the first process is heard")
    whole = np.arange(24, dtype=np.float32).reshape(8, 3)
    for sizes, count in (({}, 2), ({"fsdp": 4, "data": 1}, 2), ({"data": 2, "tensor": 2}, 2), ({"tensor": 4}, 1)):
        mesh = make_mesh(**sizes)
        share = distributed.row_share(mesh, 8)
        assert share == distributed.Share(index if count == 2 else 0, count), (sizes, share)
        assert distributed.row_share(mesh, 7) == distributed.Share(0, 1)
        placed = place_rows(whole[share.rows(8)], mesh, share.count)
        assert placed.shape == whole.shape and placed.sharding == batch_sharding(mesh)
        alike = place_rows({"rows": whole, "odd": whole[:5]}, mesh)
        double = jax.jit(lambda x: 2 * x)(placed)
        fetched = distributed.fetch({"a": double, "b": alike, "c": whole})
        np.testing.assert_array_equal(fetched["a"], 2 * whole)
        np.testing.assert_array_equal(fetched["b"]["rows"], whole)
        np.testing.assert_array_equal(fetched["b"]["odd"], whole[:5])
        assert type(fetched["a"]) is np.ndarray
"""
LOOP = """
    total = jax.jit(lambda x: x.sum())
    x = place_rows(np.ones((8, 3), np.float32), make_mesh())
    while True:
        float(total(x))
"""


def run(program, folder, capfd, processes=2):
    """The exit codes of all processes, that of the run, and what was said."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, str(folder / "program.py"), str(folder)]
    children = local_processes.start(command, processes=processes, devices=2)
    code = local_processes.wait(children)
    said = capfd.readouterr()
    return code, [child.returncode for child in children], said.out, said.err


def test_processes_agree_and_share_rows(tmp_path, capfd):
    code, _, out, err = run(START + AGREE, tmp_path, capfd)
    assert code == 0, err[-2000:]
    assert out.count("only the first process is heard") == 1
    assert (tmp_path / "by_0").is_file() and not (tmp_path / "by_1").exists()


def test_one_process_needs_nobody(tmp_path, capfd):
    alone = """
    assert distributed.gather(3) == [3] and distributed.agree("x") == "x" and distributed.is_writer()
    assert distributed.row_share(make_mesh(), 8) == distributed.Share(0, 1)
    distributed.barrier()
    """
    code, _, _, err = run(START + alone, tmp_path, capfd, processes=1)
    assert code == 0, err[-2000:]


@pytest.mark.parametrize(
    ("failing", "error", "expected"),
    [(1, 'UserError("row 7 is broken")', 2), (0, 'ValueError("a mistake")', 1)],
    ids=["others in a collective", "the first one, with a mistake in the program"],
)
def test_an_error_of_one_ends_all_with_its_name_and_code(failing, error, expected, tmp_path, capfd):
    began = time.monotonic()
    code, codes, _, err = run(f"{START}    if index == {failing}: raise {error}\n{LOOP}", tmp_path, capfd)
    assert (code, codes) == (expected, [expected] * 2)
    line = "row 7 is broken" if failing else "ValueError: a mistake"
    own, other = ("process 1: ", "") if failing else ("", "process 1: ")
    assert f"icet-jax: {own}{line}\n" in err
    assert f"icet-jax: {other}ends with process {failing}: {line}\n" in err
    assert ("Traceback" in err) == (failing == 0)
    assert time.monotonic() - began < 60


def test_a_killed_process_ends_the_others(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(local_processes, "KILLED_GRACE", 1.0)
    kill = "    if index == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
    code, _, _, err = run(START + kill + LOOP, tmp_path, capfd)
    assert code == 128 + 9
    assert "process 1 was killed (SIGKILL)" in err


def test_a_process_that_does_not_come_is_one_line(tmp_path):
    program = START.replace("distributed._GRACE", "distributed._START_SECONDS = 2; distributed._GRACE")
    (tmp_path / "program.py").write_text(program)
    alone = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | alone, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "icet-jax: process 1 of 2 did not find the others at 127.0.0.1:1 within 2 s" in done.stderr


SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "5"}


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ((None, None, None), {}, None),
        (("h:1", 1, 2), {}, Address("h:1", 1, 2)),
        (("h:1", 0, 1), {}, None),
        ((None, None, None), {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"},
         Address("h:1", 0, 2)),
        (("h:1", None, None), SLURM, Address("h:1", 1, 2)),
        (("h:1", None, None), {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"}, Address("h:1", 3, 4)),
        ((None, None, None), SLURM, "auto"),
        ((None, None, None), SLURM | {"SLURM_NTASKS": "1"}, None),
        ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}, "auto"),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, "auto"),
        ((None, None, None), {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        (("auto", None, None), {}, "auto"),
    ],
)  # fmt: skip
def test_where_the_processes_are_found(flags, environment, expected):
    assert find_address(*flags, environment) == expected


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (("h:1", None, 2), {}, "needs --process-id"),
        (("h:1", 2, 2), {}, "must be one of 0..1"),
        (("h", 0, 2), {}, "HOST:PORT"),
        ((None, 1, 2), {}, "need --coordinator"),
        ((None, None, None), {"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI 5"),
        (("h:1", None, 2), {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID=one"),
    ],
)
def test_half_an_address_is_one_line(flags, environment, message):
    with pytest.raises(UserError, match=message):
        find_address(*flags, environment)


def test_shares_cover_a_batch():
    parts = [list(range(12))[Share(index, 4).rows(12)] for index in range(4)]
    assert sum(parts, []) == list(range(12)) and {len(part) for part in parts} == {3}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("a line"), ("a line", 2)),
        (KeyboardInterrupt(), ("interrupted; the same command goes on from the last checkpoint", 130)),
        (RuntimeError("first\nsecond"), ("RuntimeError: first", 1)),
        (SystemExit(75), ("exit code 75", 75)),
        (StopRun("SIGTERM: saved"), ("SIGTERM: saved", 75)),
        (UserError("gone", exit_code=75), ("gone", 75)),
        (
            OSError(errno.ENOSPC, "No space left", "f"),
            ("f: cannot be written to (No space left); free space and start again", 75),
        ),
        (OSError(errno.EACCES, "Denied", "f"), ("PermissionError: [Errno 13] Denied: 'f'", 1)),
    ],
)
def test_what_is_said_of_an_error(error, expected):
    assert describe(error) == expected


def test_a_machine_whose_name_does_not_resolve_is_told_so(monkeypatch):
    error = RuntimeError("Unable to initialize backend 'cpu': rv == 0. -2 vs 0\nmore")
    monkeypatch.setattr(distributed.socket, "gethostname", lambda: "nowhere.invalid")
    assert "nowhere.invalid, does not resolve to an address; add it to /etc/hosts" in distributed._explain_no_devices(
        error
    )
    monkeypatch.setattr(distributed.socket, "gethostname", lambda: "localhost")
    assert distributed._explain_no_devices(error) == "Unable to initialize backend 'cpu': rv == 0. -2 vs 0"
