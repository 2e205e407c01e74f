"""Training on several (emulated) devices: the same numbers, shardings that stay, and no compilation after the first."""

from tests.devices import assert_agreed

PROGRAM = """
import jax, numpy as np
from icet_jax.algorithms import lppo
from icet_jax.algorithms.metrics import host_metrics
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import place_rows, shardings
from tests.algorithms import toy

assert jax.device_count() == 4
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
)
graphdef, params = toy.model()
settings = toy.settings(accumulation=1)
key, every, exits = jax.random.key(0), np.ones(8, bool), np.array([1, 2, 3, 4] * 2, np.int32)

def run(mesh, iterations):
    phases, state = lppo.build(graphdef, settings, mesh), toy.state(params, settings)
    weights = params if mesh is None else jax.device_put(params, shardings(params, mesh))
    state = state if mesh is None else jax.device_put(state, shardings(state, mesh))
    start, counts, rows = jax.tree.map(lambda leaf: leaf.sharding, state), [], []
    for _ in range(iterations):
        images, tokens, mask = toy.inputs()
        tokens, mask = place_rows((tokens, mask), mesh)
        rollout = phases.rollout(weights, state, images, tokens, mask, exits, key)
        state, batch, before = phases.prepare(weights, state, rollout, toy.token_score(rollout), every)
        if not rows:
            operations.append(phases.update.lower(weights, state, batch, key).compile().cost_analysis()["flops"])
        state, after = phases.update(weights, state, batch, key)
        rows.append(host_metrics(before, after))
        counts.append(len(compiled))
    end = jax.tree.map(lambda leaf: leaf.sharding, state)
    return rows, counts, [a.is_equivalent_to(b, l.ndim) for a, b, l in zip(*map(jax.tree.leaves, (start, end, state)))]

operations = []  # of an update, per device
alone, _, _ = run(None, 1)
spread, counts, kept = run(make_mesh(data=2, fsdp=2), 3)
for name, value in alone[0].items():
    np.testing.assert_allclose(spread[0][name], value, rtol=2e-3, atol=2e-4, err_msg=name)
assert all(kept)
assert counts[0] == counts[-1], counts
assert operations[1] < operations[0] / 2, operations  # four devices share the rows
print("agreed")
"""


def test_a_mesh_of_four_trains_as_one_device_does():
    assert_agreed(PROGRAM, 4, timeout=900)
