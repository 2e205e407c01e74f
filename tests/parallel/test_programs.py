"""What was traced in one process is found by the next, under everything that it follows from."""

import json
import subprocess
import sys
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax.parallel import programs
from icet_jax.parallel.programs import Program
from tests.algorithms import toy
from tests.devices import emulating

LEARN = """
import json, sys
from pathlib import Path
import jax, numpy as np
from flax import nnx
from icet_jax.algorithms import lppo
from icet_jax.models.llava.network import Llava
from icet_jax.parallel import programs
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import place_rows, shardings
from tests.algorithms import toy

folder, devices = sys.argv[1], int(sys.argv[2])
if folder != "none":
    programs.keep_traces(Path(folder))
traced = []
class Model(Llava):
    def encode(self, images, upto=None):  # runs in Python when a program of the model is traced
        traced.append(1)
        return super().encode(images, upto)
mesh, settings = make_mesh(data=2, fsdp=2) if devices == 4 else None, toy.settings(accumulation=1)
model = nnx.merge(*toy.model())
model.__class__ = Model
graphdef, params = nnx.split(model)
state = toy.state(params, settings)
inputs, key, exits = toy.inputs(), jax.random.key(0), np.array([1, 2, 3, 4] * 2, np.int32)
if mesh is not None:
    params, state = (jax.device_put(tree, shardings(tree, mesh)) for tree in (params, state))
    inputs = place_rows(inputs, mesh)
phases = lppo.build(graphdef, settings, mesh)
for _, program in phases.lowered(params, state, *inputs, exits, key):
    program.compile()
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, fun_name="", **__: compiled.append(fun_name) if name.endswith("backend_compile_duration") else None
)
first = state
for _ in range(2):
    rollout = phases.rollout(params, state, *inputs, exits, key)
    state, batch, _ = phases.prepare(params, state, rollout, toy.token_score(rollout), np.ones(8, bool))
    state, metrics = phases.update(params, state, batch, key)
assert first.trainable["value_head"]["kernel"].is_deleted(), "the state was not donated"
phases_of_it = [name for name in compiled if any(part in name for part in ("sample", "prepare_columns", "learn"))]
assert not phases_of_it, phases_of_it
leaves = jax.tree.leaves((state.trainable, metrics, rollout.tokens))
digest = [np.asarray(leaf).astype(np.float64).sum().hex() for leaf in leaves]
print(json.dumps({"traced": len(traced), "digest": digest}))
"""


def learn(folder, devices, compiled):
    environment = {"JAX_COMPILATION_CACHE_DIR": str(compiled)} | emulating(devices)
    command = [sys.executable, "-W", "error::UserWarning", "-c", LEARN, str(folder), str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("devices", [1, 4])
def test_a_second_process_traces_nothing_and_finds_the_same_bits(tmp_path, devices):
    plain, first, second = (learn(folder, devices, tmp_path / "compiled") for folder in ("none", tmp_path, tmp_path))
    assert (plain["traced"] > 0, first["traced"] > 0, second["traced"]) == (True, True, 0)
    assert plain["digest"] == first["digest"] == second["digest"]
    assert len(list(tmp_path.glob("traced-*"))) == 3


@pytest.fixture
def folder(tmp_path):
    programs.keep_traces(tmp_path)
    yield tmp_path
    programs.keep_traces(None)


def counted(cache_key=("sine",), **options):
    """A program and how often it was traced."""
    calls = []

    def function(x, **static):
        calls.append(static)
        return {"sum": (x["a"] * 3 + static.get("more", 0), None)}

    return Program(function, cache_key=cache_key, **options), calls


X = {"a": np.arange(3, dtype=np.float32)}


def test_kept_ones_are_found_by_what_they_are_about_and_by_shapes_and_static_arguments(folder):
    program, calls = counted(static="more")
    np.testing.assert_array_equal(program(X, more=2)["sum"][0], X["a"] * 3 + 2)
    assert calls and program(X, more=2)["sum"][1] is None
    again, calls = counted(static="more")
    np.testing.assert_array_equal(again(X, more=2)["sum"][0], X["a"] * 3 + 2)
    assert again.eval_shape(X, more=2)["sum"][0].shape == (3,) and not calls
    np.testing.assert_array_equal(again(X, more=1)["sum"][0], X["a"] * 3 + 1)
    assert calls == [{"more": 1}]
    again({"a": np.zeros(4, np.float32)}, more=1)
    again({"a": np.zeros(3, np.float16)}, more=1)
    assert len(calls) == 3
    other, calls = counted(cache_key=("cosine",), static="more")
    other(X, more=2)
    assert calls


@pytest.mark.parametrize("change", ["source", "setting", "version"])
def test_another_package_setting_or_version_is_another_program(folder, change, monkeypatch):
    counted()[0](X)
    again, calls = counted()
    if change == "setting":
        with jax.default_matmul_precision("tensorfloat32"):
            again(X)
    else:
        facts = list(programs._versions())
        facts[0 if change == "source" else 2] += "1"
        monkeypatch.setattr(programs, "_versions", lambda: tuple(facts))
        again(X)
    assert calls


def test_this_package_is_named_by_its_source_and_what_it_is_built_on():
    source, _, *versions = programs._versions()
    assert len(source) == 64 and f"jax {jax.__version__}" in versions


@pytest.mark.parametrize("cache_key", [None, (object(),), (np.zeros(5000),)])
def test_what_cannot_be_named_is_not_kept(folder, cache_key):
    program, calls = counted(cache_key=cache_key)
    program(X), program(X)
    assert len(calls) == 1 and not list(folder.iterdir())


def test_results_of_other_classes_are_computed_but_not_kept(folder):
    pair = namedtuple("pair", "a b")
    program = Program(lambda x: pair(x + 1, x), cache_key=())
    assert program(jnp.zeros(2)).a.tolist() == [1, 1] and not list(folder.iterdir())


def test_classes_of_the_package_and_of_optax_come_back(folder):
    state = toy.state(toy.model()[1])
    for _ in range(2):
        found = Program(lambda key: state, cache_key=())(jax.random.key(0))
        assert jax.tree.structure(found) == jax.tree.structure(state)
    (file,) = folder.iterdir()
    assert b"optax._src.transform:ScaleByAdamState" in file.read_bytes()


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data.replace(b"array", b"arraz")]
)
def test_a_damaged_file_is_made_again(folder, damage):
    counted()[0](X)
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    program, calls = counted()
    np.testing.assert_array_equal(program(X)["sum"][0], X["a"] * 3)
    again, more = counted()
    again(X)
    assert calls and not more


def test_a_file_cannot_name_other_code(folder):
    with pytest.raises(ValueError, match="os:system"):
        programs._rebuild({"os:system": {}}, ())


def test_inside_another_function_it_is_traced_with_it(folder):
    program, _ = counted()
    assert jax.jit(program)(X)["sum"][0].shape == (3,) and not list(folder.iterdir())


def test_kernels_that_cannot_be_exported_are_computed_all_the_same(folder):
    program = Program(lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((3,), np.float32), x), cache_key=())
    np.testing.assert_allclose(program(X["a"]), np.sin(X["a"]), rtol=1e-6)
    assert not list(folder.iterdir())
