"""The optimizer of policy and value head, together and apart, against AdamW written out in float64."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType

from icet_jax.algorithms.settings import from_config
from icet_jax.algorithms.state import learning_rate, make_optimizer
from icet_jax.config import default
from icet_jax.generation.sampling import Sampling
from icet_jax.parallel.sharding import shardings

DEFAULT = from_config(default(), Sampling(max_new_tokens=1)).optimizer
JOINT = dataclasses.replace(DEFAULT, learning_rate=0.1, max_grad_norm=1.0, weight_decay=0.01)
START = {"policy": {"a": [1.0, -2.0]}, "value_head": {"kernel": [[0.5], [0.25]]}}
# Gradients of three steps: the value head's grow, the policy's stay.
STEPS = [{"policy": {"a": [0.3, 0.4]}, "value_head": {"kernel": [[size], [0.0]]}} for size in (0.5, 40.0, 1.0)]


def floats(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree, is_leaf=lambda leaf: isinstance(leaf, list))


def trained(settings):
    """The weights after the three steps."""
    optimizer, weights = make_optimizer(settings), floats(START)
    state = optimizer.init(weights)
    for gradient in STEPS:
        updates, state = optimizer.update(floats(gradient), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


def adamw(start, gradients, rates, limit, decay=0.01, b1=0.9, b2=0.999, eps=1e-8):
    """AdamW after clipping by the norm, in float64."""
    weights = np.asarray(start, np.float64)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        gradient = np.asarray(gradient, np.float64)
        norm = np.linalg.norm(gradient)
        gradient = gradient * (limit / norm if limit and norm > limit else 1.0)
        first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
        scaled = first / (1 - b1**step) / (np.sqrt(second / (1 - b2**step)) + eps)
        weights = weights - rate * (scaled + decay * weights)
    return weights


def policy_alone():
    return adamw(START["policy"]["a"], [step["policy"]["a"] for step in STEPS], [0.1] * 3, 1.0)


def test_a_value_error_shrinks_the_policys_steps_only_where_they_are_clipped_together():
    apart = trained(dataclasses.replace(JOINT, value_max_grad_norm=1.0))
    np.testing.assert_allclose(apart["policy"]["a"], policy_alone(), rtol=1e-5)
    together = trained(JOINT)
    assert np.abs(together["policy"]["a"] - policy_alone()).max() > 0.01


def test_the_value_head_has_its_own_rate_clip_and_warm_up():
    settings = dataclasses.replace(JOINT, value_learning_rate=0.02, value_max_grad_norm=0.0, value_warmup_steps=2)
    wanted = adamw(
        START["value_head"]["kernel"], [step["value_head"]["kernel"] for step in STEPS], [0.0, 0.01, 0.02], 0.0
    )
    weights = trained(settings)
    np.testing.assert_allclose(weights["value_head"]["kernel"], wanted, rtol=1e-5)
    np.testing.assert_allclose(weights["policy"]["a"], policy_alone(), rtol=1e-5)


def test_a_cosine_ends_at_its_share_of_the_peak():
    settings = dataclasses.replace(JOINT, schedule="cosine", warmup_steps=2, total_steps=10, final_share=0.05)
    rates = [float(learning_rate(settings)(step)) for step in (0, 1, 2, 6, 10, 50)]
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.1, 0.0525, 0.005, 0.005], rtol=1e-5)


@pytest.mark.parametrize("field", ["value_learning_rate", "value_max_grad_norm", "value_warmup_steps"])
def test_the_config_reaches_the_optimizer(field):
    config = default().unlock()
    config.lppo[field] = 3
    settings = from_config(config, Sampling(max_new_tokens=1))
    assert getattr(settings.optimizer, field) == 3
    assert getattr(from_config(default(), Sampling(max_new_tokens=1)).optimizer, field) is None


def test_the_state_of_apart_optimizers_has_places_on_a_mesh():
    mesh = AbstractMesh((2, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    policy = {"q_proj": {"a": np.zeros((2, 8, 4), np.float32), "b": np.zeros((2, 4, 8), np.float32)}}
    head = {"kernel": np.zeros((8, 1), np.float32), "bias": np.zeros(1, np.float32)}
    weights = {"policy": policy, "value_head": head}
    state = make_optimizer(dataclasses.replace(JOINT, value_learning_rate=1.0)).init(weights)
    places = shardings(state, mesh, prefix="opt_state")
    assert len(jax.tree.leaves(places)) == len(jax.tree.leaves(state))
