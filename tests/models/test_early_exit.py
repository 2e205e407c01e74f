"""`encode(images, upto=l)` computes the blocks up to l and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.models.llava.network import Llava, LlavaConfig
from icet_jax.nn.clip import ClipConfig
from icet_jax.nn.llama import LlamaConfig
from icet_jax.nn.protocols import one_image_per_row

VISION = ClipConfig(48, 96, num_hidden_layers=6, num_attention_heads=4, image_size=28, patch_size=7)
TEXT = LlamaConfig(263, 32, 53, 2, 4, 2, 8)


@pytest.fixture(scope="module")
def model():
    return Llava(LlavaConfig(vision=VISION, text=TEXT, image_token_index=259), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def images():
    return one_image_per_row(jax.random.normal(jax.random.key(1), (2, 3, 28, 28)))


def lowered(model, images, upto):
    """`visual` at a static exit, lowered."""
    graphdef, params = nnx.split(model)

    def run(params, pixels):
        network = nnx.merge(graphdef, params)
        return network.visual(network.encode(one_image_per_row(pixels), upto), jnp.int32(upto))

    return jax.jit(run).lower(params, images.pixels)


@pytest.mark.parametrize("upto", range(VISION.num_hidden_layers + 1))
def test_upto_gives_the_identical_features(model, images, upto):
    whole = model.encode(images)
    part = model.encode(images, upto=upto)
    assert part.states.shape[0] == upto + 1
    np.testing.assert_array_equal(np.asarray(part.states), np.asarray(whole.states[: upto + 1]))
    exits = jnp.int32(upto)
    np.testing.assert_array_equal(np.asarray(model.visual(part, exits)), np.asarray(model.visual(whole, exits)))


def test_upto_out_of_range_is_refused(model, images):
    with pytest.raises(ValueError, match="upto=7"):
        model.encode(images, upto=7)


def test_upto_computes_fewer_flops(model, images, monkeypatch):
    """Layer scans are unrolled here, as XLA's count takes the body of a loop once whatever its length is."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    programs = {upto: lowered(model, images, upto) for upto in (1, 3, 6)}
    counted = {upto: program.compile().cost_analysis()["flops"] for upto, program in programs.items()}
    tokens, width, ffn = 2 * (VISION.num_patches + 1), VISION.hidden_size, VISION.intermediate_size
    matmuls = 2 * tokens * width * (4 * width + 2 * ffn)
    for fewer, more in ((1, 3), (3, 6)):
        per_block = (counted[more] - counted[fewer]) / (more - fewer)
        assert matmuls < per_block < 2 * matmuls, counted


def test_upto_bounds_the_scan(model, images):
    graphdef, params = nnx.split(model)
    for upto in (0, 2, 6):
        jaxpr = jax.make_jaxpr(lambda params, upto=upto: nnx.merge(graphdef, params).encode(images, upto))(params)
        assert [eqn.params["length"] for eqn in jaxpr.eqns if eqn.primitive.name == "scan"] == [upto]


def test_a_new_traced_exit_compiles_nothing(model, images):
    encoded = model.encode(images)
    graphdef, params = nnx.split(model)
    visual = jax.jit(lambda params, encoded, exits: nnx.merge(graphdef, params).visual(encoded, exits))
    outputs = [np.asarray(visual(params, encoded, jnp.int32(exit_layer))) for exit_layer in range(1, 7)]
    assert visual._cache_size() == 1
    assert len({output.tobytes() for output in outputs}) == 6


def test_each_row_may_have_its_own_exit(model, images):
    encoded = model.encode(images)
    both = np.asarray(model.visual(encoded, jnp.array([2, 5])))
    for row, exit_layer in enumerate((2, 5)):
        single = np.asarray(model.visual(encoded, jnp.int32(exit_layer)))
        np.testing.assert_allclose(both[row], single[row], atol=1e-6)
