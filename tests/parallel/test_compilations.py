"""Programs are kept between processes and compiled before the first step, which then compiles nothing."""

import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from icet_jax.parallel import compilations
from icet_jax.runs import run_dir
from icet_jax.runs.config_files import load
from tests.devices import emulating
from tests.runs import smoke

AHEAD = """
import jax, numpy as np
from icet_jax.algorithms import lppo
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import place_rows, shardings
from icet_jax.parallel.compilations import CompilationCounter, compile_programs
from tests.algorithms import toy

mesh, settings = make_mesh(data=2, fsdp=2), toy.settings(accumulation=1)
graphdef, params = toy.model()
state = toy.state(params, settings)
params, state = (jax.device_put(tree, shardings(tree, mesh)) for tree in (params, state))
phases, key, exits = lppo.build(graphdef, settings, mesh), jax.random.key(0), np.array([1, 2, 3, 4] * 2, np.int32)
inputs = place_rows(toy.inputs(), mesh)
compile_programs(phases.lowered(params, state, *inputs, exits, key))
scores, learned = np.ones(8, np.float32), np.ones(8, bool)
with CompilationCounter() as counter:
    rollout = phases.rollout(params, state, *inputs, exits, key)
    state, batch, _ = phases.prepare(params, state, rollout, scores, learned)
    phases.update(params, state, batch, key)
print("compiled in the first step:", counter.count)
"""

KEPT = """
import sys
import time
from icet_jax.parallel.compilations import keep_programs
keep_programs(sys.argv[1] if len(sys.argv) > 1 else None)
import jax, jax.numpy as jnp
from icet_jax.parallel.compilations import compile_programs
compile_programs([("sine", jax.jit(lambda x: jnp.sin(x) * 3).lower(jnp.ones(3)))])
"""


def python(program, *arguments, **environment):
    without = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    environment = without | {"JAX_PLATFORMS": "cpu"} | environment
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_on_a_mesh_the_first_step_compiles_nothing_after_the_programs_were_compiled_at_once():
    kept = {name: value for name, value in os.environ.items() if "CACHE" in name}
    done = python(AHEAD, XLA_FLAGS=emulating(4)["XLA_FLAGS"], **kept)
    assert done.stdout.splitlines()[-1] == "compiled in the first step: 0"
    assert done.stderr.splitlines()[-1].startswith("compiled: update ")
    assert all(f"{name} " in done.stderr for name in ("update", "rollout", "prepare"))


def test_a_second_process_reads_what_the_first_one_compiled(tmp_path):
    first, second = python(KEPT, tmp_path / "programs"), python(KEPT, tmp_path / "programs")
    assert "kept from before" not in first.stderr
    assert "1 of 1 kept from before" in second.stderr


def test_where_nothing_is_said_programs_are_kept_in_the_users_cache_folder_for_the_user_alone(tmp_path):
    python(KEPT, XDG_CACHE_HOME=str(tmp_path))
    (folder,) = (tmp_path / "icet_jax" / "compiled").iterdir()  # one for machines like this one
    assert folder.stat().st_mode & 0o777 == 0o700
    assert any(name.name.endswith("-cache") for name in folder.iterdir())
    python(KEPT, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert any(name.name.endswith("-cache") for name in (tmp_path / "mine").iterdir())


def test_off_keeps_nothing(tmp_path):
    python(KEPT, "off", XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_costs_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = python(KEPT, tmp_path / "file" / "programs")
    told, compiled = done.stderr.splitlines()
    assert "cannot be kept there (Not a directory)" in told and "--config.compilation_cache=FOLDER" in told
    assert compiled.startswith("compiled: sine ")


def test_a_damaged_entry_is_compiled_again(tmp_path):
    python(KEPT, tmp_path)
    (folder,) = tmp_path.iterdir()
    for entry in folder.glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:40])
    assert "compiled: sine " in python(KEPT, tmp_path).stderr


def test_the_oldest_programs_go_when_there_are_too_many(tmp_path, monkeypatch):
    for age, name in enumerate(("new", "older", "oldest")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(compilations, "_MAX_CACHE_BYTES", 20)
    compilations._drop_oldest(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "older"}


def test_another_cache_folder_is_the_same_run(tmp_path):
    def config(folder):
        return load(smoke.CONFIG, [("compilation_cache", folder)])

    run_dir.claim(tmp_path, config("here"))
    (tmp_path / "metrics.jsonl").touch()  # it has begun
    run_dir.claim(tmp_path, config("there"))
    assert json.loads((tmp_path / "config.json").read_text())["compilation_cache"] == "here"


def test_an_error_while_compiling_is_raised():
    class Broken:
        def compile(self):
            raise RuntimeError("no such instruction")

    good = jax.jit(jnp.cos).lower(jnp.ones(2))
    with pytest.raises(RuntimeError, match="no such instruction"):
        compilations.compile_programs([("good", good), ("broken", Broken())])


def test_something_else_is_done_while_programs_compile():
    order = []

    class Slow:
        def compile(self):
            while "read" not in order:
                time.sleep(0.01)
            order.append("compiled")

    assert compilations.compile_programs([("slow", Slow())], lambda: order.append("read") or "state") == "state"
    assert order == ["read", "compiled"]
