"""The scan of an update's steps, on a loss of one number."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from icet_jax.algorithms.metrics import host_metrics, policy_metrics, step_metrics
from icet_jax.algorithms.state import Controls, TrainState, make_optimizer
from icet_jax.algorithms.updates import optimise, shuffled_order
from icet_jax.typing import Array
from tests.algorithms import toy

OPTIMIZER = dataclasses.replace(toy.SETTINGS.optimizer, learning_rate=0.1, weight_decay=0.01, max_grad_norm=0.0)


def loss_function(trainable: dict, rows: dict) -> tuple[Array, dict[str, Array]]:
    loss = jnp.mean((trainable["w"] - rows["x"]) ** 2)
    names = ("approxkl", "clipfrac", "entropy", "policy", "value", "ratio", "ratio_var", "ratio_max", "value_clipfrac")
    return loss, dict.fromkeys(names, loss)


def update(tokens, scale=None):
    trainable, optimizer = {"w": jnp.ones(3)}, make_optimizer(OPTIMIZER)
    order = shuffled_order(jax.random.key(0), rows=4, epochs=1, minibatches=1, accumulation=1)
    opt_state, row_tokens = optimizer.init(trainable), jnp.full(4, tokens, jnp.int32)
    batch = {"x": jnp.arange(4.0)[:, None]}
    outcome = optimise(loss_function, optimizer, trainable, opt_state, batch, row_tokens, order, scale=scale)
    controls = Controls(kl_coef=jnp.ones(()), normaliser=None, learning_rate_scale=scale)
    state = TrainState(trainable, opt_state, controls, jnp.asarray(0), jnp.asarray(0))
    return outcome, host_metrics(policy_metrics(outcome) | step_metrics(state, outcome, OPTIMIZER))


def test_the_scale_is_of_every_step_and_of_the_learning_rate_that_is_reported():
    plain, row = update(tokens=2)
    one, _ = update(tokens=2, scale=jnp.ones((), jnp.float32))
    half, halved = update(tokens=2, scale=jnp.asarray(0.5, jnp.float32))
    np.testing.assert_array_equal(one.trainable["w"], plain.trainable["w"])
    np.testing.assert_allclose(1 - half.trainable["w"], (1 - plain.trainable["w"]) / 2, rtol=1e-5)
    assert row["train/learning_rate"] == pytest.approx(0.1) and halved["train/learning_rate"] == pytest.approx(0.05)
    assert optax.tree.norm(half.opt_state) == optax.tree.norm(plain.opt_state)


def test_means_over_no_step_are_left_out():
    _, row = update(tokens=0)
    assert row == {"policy/early_stop": 0, "train/updates": 0, "train/learning_rate": row["train/learning_rate"],
                   "train/nonfinite": 0}  # fmt: skip
    _, row = update(tokens=1)
    assert {
        "val/ratio",
        "loss/total_avg",
        "policy/approxkl_avg",
        "train/grad_norm",
    } <= row.keys() and "steps" not in row
