"""What the decoder does differently on GPUs gives the same results: aligned sequences, and joined projections."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.nn import alignment, fused
from icet_jax.nn.layers import Lora, positions_from_mask
from icet_jax.nn.llama import Llama, lora_shapes
from icet_jax.nn.protocols import init_lora
from tests.algorithms import toy
from tests.nn.test_attention import padding

ROWS, LENGTH, ROOM = 5, 13, 4


def network(biased=(), qk_norm=False):
    config = dataclasses.replace(toy.TEXT, biased=biased, qk_norm=qk_norm, num_attention_heads=4, num_key_value_heads=2)
    graphdef, state = nnx.split(Llama(config, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(state)
    noise = jax.random.split(jax.random.key(1), len(leaves))  # biases are not zero
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, noise, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))


def adapters(config, targets):
    lora = init_lora(lora_shapes(config), rank=3, alpha=5.0, targets=targets, key=jax.random.key(2))
    return Lora(jax.tree.map(lambda leaf: leaf + 0.1, lora.weights), lora.scale)


@pytest.mark.parametrize(
    ("biased", "qk_norm"),
    [((), False), (("q_proj", "k_proj", "v_proj"), False), ((), True)],
    ids=["llama", "qwen2", "qwen3"],
)
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj", "gate_proj", "down_proj")], ids=["plain", "lora"])
def test_joined_projections_decode_the_same(monkeypatch, biased, qk_norm, targets):
    model = network(biased, qk_norm)
    lora = adapters(model.config, targets) if targets else None
    mask = jnp.arange(LENGTH) < jnp.array([13, 5, 9, 1, 0])[:, None]
    embeddings = jax.random.normal(jax.random.key(3), (ROWS, LENGTH, model.config.hidden_size))
    _, cache = model.prefill(embeddings, positions_from_mask(mask), mask, lora=lora)
    cache, tokens = cache.with_room(ROOM), jnp.arange(ROWS)
    active = mask.any(axis=1)
    expected = model.step(tokens, active, cache, model.unstack_layers(lora))
    with monkeypatch.context() as patch:
        patch.setattr(fused, "platform_of", lambda device: "gpu")
        joined = model.unstack_layers(lora)
    assert all(isinstance(layer, fused.FusedLayer) for layer, _ in joined.layers)
    got = model.step(tokens, active, cache, joined)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sections", [(), (3,)], ids=["positions", "multimodal"])
def test_aligned_sequences_have_the_same_states_and_gradients(monkeypatch, sections):
    model = network()
    if sections:
        model.config = dataclasses.replace(model.config, mrope_section=(2, 1, 1))
    mask = jnp.asarray(padding(ROWS, LENGTH))
    positions = jnp.broadcast_to(positions_from_mask(mask), (*sections, ROWS, LENGTH))
    embeddings = jax.random.normal(jax.random.key(3), (ROWS, LENGTH, model.config.hidden_size))
    weights = jax.random.normal(jax.random.key(4), embeddings.shape) * mask[:, :, None]

    def total(embeddings):
        hidden = model(embeddings, positions, mask)
        return jnp.sum(hidden * weights), hidden * mask[:, :, None]

    expected = jax.grad(total, has_aux=True)(embeddings)
    monkeypatch.setattr(alignment, "platform_of", lambda device: "gpu")
    aligned = alignment.align(embeddings, positions, mask)
    assert aligned.mask.shape == (ROWS, 16) and aligned.right_padded
    np.testing.assert_array_equal(aligned.mask, np.arange(16) < np.asarray(mask).sum(axis=1)[:, None])
    np.testing.assert_array_equal(aligned.restore(aligned.embeddings), embeddings)
    for one, other in zip(jax.grad(total, has_aux=True)(embeddings), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
