"""What losses and gradients are compared with: one row at a time, unpadded, and in float64 behind the network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icet_jax.algorithms.forward import with_policy
from icet_jax.nn.layers import positions_from_mask
from tests.algorithms import toy


def moved_state(settings, seed=3):
    """A policy that differs from the reference."""
    state = toy.state(toy.model()[1], settings)
    leaves, structure = jax.tree.flatten(state.trainable["policy"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    trainable = {**state.trainable, "policy": jax.tree.unflatten(structure, noise)}
    return state._replace(trainable=trainable)


@functools.partial(jax.jit, static_argnames=("scale", "answer"))
def row_logits(policy, tokens, own, *, scale, answer):
    """Logits of one row's `answer` response tokens, without padding on either side: [answer, V].

    One program for each length, as the weights that the tests change are arguments; `policy` None is the reference.
    """
    graphdef, params = toy.model()
    weights, lora = (params, None) if policy is None else with_policy(params, {"policy": policy}, scale)
    model, mask = nnx.merge(graphdef, weights), jnp.ones(tokens.shape, bool)
    hidden = model.decode(tokens, positions_from_mask(mask), mask, own, lora)[0, -answer:]
    return model.logits(hidden[None])[0]


@functools.partial(jax.jit, static_argnames=("scale", "answer"))
def pulled_back(policy, tokens, own, slope, *, scale, answer):
    """The gradient with respect to the policy whose gradient with respect to a row's logits is `slope`."""
    logits = functools.partial(row_logits, tokens=tokens, own=own, scale=scale, answer=answer)
    return jax.vjp(logits, policy)[1](slope)[0]


def log_softmax64(logits, settings):
    """Float64 log-probs of the sampling distribution, the suppressed tokens taken out of the vocabulary."""
    kept = np.setdiff1d(np.arange(logits.shape[-1]), settings.sampling.suppress_ids)
    scaled = np.asarray(logits, np.float64)[:, kept] / settings.sampling.temperature
    scaled -= scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True)), kept


def one_row(tree, row):
    """The leaves' own parts of one row, as a batch of one."""
    return jax.tree.map(lambda leaf: leaf[row : row + 1], tree)


def assert_same(mine, theirs):
    """Gradients agree, up to rounding that is small beside the largest of them."""
    scale = max(1.0, *(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(theirs)))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 * scale)
