"""On a mesh a row's image features, cache and slot stay on its devices: what travels does not grow with the batch."""

from tests.devices import assert_agreed

TAKEN = """
import jax, jax.numpy as jnp, numpy as np
from icet_jax.parallel import traced
from icet_jax.parallel.collectives import moved_bytes
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import ROWS
from jax.sharding import NamedSharding, PartitionSpec as P
rng = np.random.default_rng(0)
states = rng.normal(size=(5, 16, 6, 3)).astype(np.float32)
layers, numbers = rng.integers(0, 5, 8, np.int32), rng.integers(0, 16, 8, np.int32)
for sizes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = make_mesh(**sizes)
    placed = jax.device_put(states, NamedSharding(mesh, P(None, ROWS)))
    for at_once in (1 << 28, 8 * 6 * 3 * 4 // 3):  # whole, and in three parts
        traced._MAX_SEND_BYTES = at_once
        program = jax.jit(lambda *given: traced.take_exit_states(*given)).lower(placed, layers, numbers).compile()
        found = program(placed, layers, numbers)
        np.testing.assert_array_equal(found, states[layers, numbers])
        assert found.sharding.shard_shape(found.shape)[0] == 8 // (8 // mesh.shape["tensor"]), found.sharding
        assert 0 < moved_bytes(program.as_text()) <= 2 * found.nbytes < states.nbytes
    few = jax.jit(lambda *given: traced.take_exit_states(*given))(placed, layers[:3], numbers[:3])  # not equally many
    np.testing.assert_array_equal(few, states[layers[:3], numbers[:3]])
    program = jax.jit(lambda states, layers: traced.take_exit_states(states, layers, None))
    every = np.arange(16, dtype=np.int32) % 5
    every = jax.device_put(every, NamedSharding(mesh, P(ROWS)))
    np.testing.assert_array_equal(program(placed, every), states[every, np.arange(16)])
    assert moved_bytes(program.lower(placed, every).compile().as_text()) == 0
print("agreed")
"""


def test_features_of_chosen_images_travel_alone():
    assert_agreed(TAKEN, 8, timeout=300)


SLOTS = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from icet_jax.evaluation.queue import encode
from icet_jax.generation import engine
from icet_jax.nn.protocols import one_image_per_row
from icet_jax.parallel.collectives import moved_bytes
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import place_rows, shardings
from tests.generation import test_engine as alone
from tests.generation.test_decode import CONFIG, Llava, pixels
graphdef, params = nnx.split(Llava(CONFIG, rngs=nnx.Rngs(0)))
images = one_image_per_row(jnp.concatenate([pixels(6), pixels(2)]))
chosen = alone.requests()
expected = alone.answers((graphdef, params, encode(graphdef, params, images)), chosen)
assert len({len(item.tokens) for item in expected.values()}) > 1
for sizes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = make_mesh(**sizes)
    spread = jax.device_put(params, shardings(params, mesh))
    encoded = encode(graphdef, spread, place_rows(images, mesh))
    for slots in (16, 13):  # split over the mesh, and not
        machine = engine.Engine(graphdef, spread, alone.GREEDY, slots=slots, columns=alone.WIDTH + 20, mesh=mesh)
        found = [item for some in machine.run(alone.work(chosen, encoded, together=8)) for item in some]
        assert sorted(item.tag for item in found) == sorted(chosen)
        for item in found:
            np.testing.assert_array_equal(item.tokens, expected[item.tag].tokens)
            np.testing.assert_allclose(item.log_probs, expected[item.tag].log_probs, atol=2e-5)
# Over `data` alone no weights travel, and no activations.
mesh = make_mesh()
spread = jax.device_put(params, shardings(params, mesh))
encoded = encode(graphdef, spread, place_rows(images, mesh))
first = next(alone.work(chosen, encoded, together=8))
machine = engine.Engine(graphdef, spread, alone.GREEDY, slots=16, columns=alone.WIDTH + 20, mesh=mesh)
lowered = dict(machine.lowered(first, [alone.WIDTH]))
states = 8 * encoded.states[0, 0].nbytes
assert 0 < moved_bytes(lowered[f"prompts of {alone.WIDTH}"].compile().as_text()) <= 2 * states
whole = jax.jit(lambda params, encoded, exits: nnx.merge(graphdef, params).visual(encoded, exits))
exits = place_rows(np.arange(8, dtype=np.int32) % 3 + 1, mesh)
assert moved_bytes(whole.lower(spread, encoded, exits).compile().as_text()) == 0
print("agreed")
"""


def test_a_prompt_gets_a_slot_where_it_is_run_and_the_answer_that_it_gets_alone():
    assert_agreed(SLOTS, 8, timeout=300)


SLICES = """
import jax, numpy as np
from icet_jax.algorithms.updates import shuffled_order, take_rows
from icet_jax.parallel.collectives import moved_bytes
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import batch_sharding, place_rows, split_rows
images = np.arange(48 * 6, dtype=np.float32).reshape(48, 2, 3)
for sizes in ({}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = make_mesh(**sizes)

    def slices(images, key):
        order = shuffled_order(key, rows=48, epochs=1, minibatches=2, accumulation=3)
        return jax.lax.map(lambda chosen: split_rows(take_rows(images, chosen), mesh), order.reshape(6, 8))

    program = jax.jit(slices).lower(place_rows(images, mesh), jax.random.key(0)).compile()
    assert moved_bytes(program.as_text()) == 0, program.as_text()
    found = np.asarray(program(place_rows(images, mesh), jax.random.key(0)))
    np.testing.assert_array_equal(np.sort(found.reshape(48, 6), axis=0), images.reshape(48, 6))
print("agreed")
"""


def test_slices_of_an_update_take_rows_where_they_lie():
    assert_agreed(SLICES, 8, timeout=300)
