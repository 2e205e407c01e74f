"""Under `fsdp` kernels travel where tokens are many, activations where they are few; without a mesh nothing happens."""

import jax
import jax.numpy as jnp
import numpy as np

from icet_jax.parallel.traced import by_rows, gather_weights, mesh_of
from tests.devices import assert_agreed

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from icet_jax.parallel.collectives import moved_bytes
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import place_rows, shardings
from icet_jax.parallel.traced import by_rows, gather_weights
mesh = make_mesh(data=1, fsdp=8)
width, depth = 64, 3
def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) * shape[-2] ** -0.5
weights = {"up_proj": {"kernel": draw(0, depth, width, 256)}, "down_proj": {"kernel": draw(1, depth, 256, width)}}
def run(place):
    def loss(weights, x):
        def body(x, layer):
            if place:
                layer = gather_weights(layer, x)
            x = x + jax.nn.silu(x @ layer["up_proj"]["kernel"]) @ layer["down_proj"]["kernel"]
            return (by_rows(x) if place else x), None
        body = jax.checkpoint(body, prevent_cse=False)
        return jnp.square(jax.lax.scan(body, by_rows(x) if place else x, weights)[0]).mean()
    return jax.jit(jax.grad(loss))
placed = jax.device_put(weights, shardings({"layers": weights}, mesh)["layers"])
kernels = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
for tokens in (128, 1):
    x = draw(2, 8, tokens, width)
    split = jax.device_put(x, NamedSharding(mesh, P(None, None, "fsdp")))  # as an embedding comes
    programs = [run(place).lower(placed, split).compile() for place in (True, False)]
    moved = [moved_bytes(program.as_text()) for program in programs]
    if tokens == 1:
        assert moved[0] == moved[1] < kernels / 2, moved
    else:  # kernels forward, again when recomputed, and their gradients (counted twice); far less than the activations
        assert moved[0] <= 4.2 * kernels < moved[1] / 2, (moved, kernels)
    got, expected = programs[0](placed, split), run(False)(weights, x)
    for name in weights:
        gradient = got[name]["kernel"]
        assert gradient.sharding.is_equivalent_to(placed[name]["kernel"].sharding, 3), gradient.sharding
        np.testing.assert_allclose(gradient, expected[name]["kernel"], rtol=1e-4, atol=1e-7)
print("agreed")
"""


def test_kernels_travel_to_many_tokens_and_stay_with_few():
    assert_agreed(PROGRAM, 8, timeout=300)


def test_without_a_mesh_nothing_is_added():
    x, weights = jnp.ones((8, 128, 16)), {"up_proj": {"kernel": jnp.ones((16, 32))}}

    def layer(weights, x):
        assert mesh_of(x) is None
        return by_rows(x) @ gather_weights(weights, x)["up_proj"]["kernel"]

    assert [str(eqn.primitive) for eqn in jax.make_jaxpr(layer)(weights, x).eqns] == ["dot_general"]
    np.testing.assert_array_equal(layer(weights, x), 16.0)
