"""The anchor to the default exit, within L-PPO and alone (L-Distill)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.algorithms import exits, ldistill, lppo
from icet_jax.algorithms.metrics import host_metrics
from icet_jax.config.names import DISTILLED_ON
from tests.algorithms import toy
from tests.algorithms.by_hand import assert_same, log_softmax64, moved_state, one_row, pulled_back, row_logits
from tests.devices import assert_agreed

RUN_KEY = jax.random.key(0)
EXITS = np.array([1, 2, 3, 4, 1, 2, 3, 4], np.int32)
COEF = 0.3


def sampled(phases, params, state):
    """A rollout whose first three rows have answers: with one image, none and two."""
    rollout = phases.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    return rollout._replace(mask=rollout.mask & (np.arange(8) < 3)[:, None])


def by_hand(settings, trainable, rollout):
    """(mean KL, its gradient): numpy's float64 on every row alone, pulled back through the network row by row."""
    policy, scale = trainable["policy"], settings.lora_scale
    total, grads = 0.0, jax.tree.map(jnp.zeros_like, policy)
    count = int(np.asarray(rollout.mask).sum())
    for row in np.flatnonzero(np.asarray(rollout.mask).any(1)):
        prompt = np.asarray(rollout.prompts)[row][np.asarray(rollout.prompt_mask)[row]]
        answer = np.asarray(rollout.tokens)[row][np.asarray(rollout.mask)[row]]
        tokens = jnp.asarray(np.concatenate([prompt, answer[:-1]]))[None]
        own, anchor = (one_row(part, row) for part in (rollout.visual, rollout.anchor_visual))
        logits = row_logits(policy, tokens, own, scale=scale, answer=len(answer))
        anchored = row_logits(None, tokens, anchor, scale=None, answer=len(answer))
        target, kept = log_softmax64(anchored, settings)
        log_probs, _ = log_softmax64(logits, settings)
        total += (np.exp(target) * (target - log_probs)).sum() / count
        slope = np.zeros(logits.shape, np.float32)
        slope[:, kept] = (np.exp(log_probs) - np.exp(target)) / settings.sampling.temperature / count
        pull = pulled_back(policy, tokens, own, slope, scale=scale, answer=len(answer))
        grads = jax.tree.map(jnp.add, grads, pull)
    return total, grads


@pytest.mark.parametrize("lora_scale", [2.0, None], ids=["lora", "full"])
@pytest.mark.parametrize("on", DISTILLED_ON)
def test_distillation_is_the_kl_of_whole_distributions(lora_scale, on):
    graphdef, params = toy.model()
    settings = toy.settings(lora_scale=lora_scale)
    state = moved_state(settings)
    phases = ldistill.build(graphdef, settings, on)
    rollout = sampled(phases, params, state)
    hidden = ldistill._target_slice(graphdef, params, rollout)
    batch = ldistill.DistillBatch(
        rollout.prompts, rollout.prompt_mask, rollout.visual, rollout.tokens, rollout.mask, hidden
    )
    compute = jax.jit(jax.value_and_grad(lambda t: ldistill.ldistill_loss(graphdef, settings, params, t, batch)[0]))
    loss, grads = compute({"policy": state.trainable["policy"]})
    expected, slopes = by_hand(settings, state.trainable, rollout)
    assert expected > 0.01
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert_same(grads["policy"], slopes)


@pytest.mark.parametrize("lora_scale", [2.0, None], ids=["lora", "full"])
def test_the_anchor_adds_its_kl_to_the_loss_of_lppo(lora_scale):
    graphdef, params = toy.model()
    settings = toy.settings(lora_scale=lora_scale, anchor_coef=COEF)
    state = moved_state(settings)
    phases = lppo.build(graphdef, settings)
    rollout = sampled(phases, params, state)
    _, batch, _ = phases.prepare(params, state, rollout, toy.token_score(rollout), np.ones(8, bool))
    dirty = batch._replace(anchor_hidden=jnp.where(batch.mask[..., None], batch.anchor_hidden, jnp.nan))

    def loss(coef):
        chosen = toy.settings(lora_scale=lora_scale, anchor_coef=coef)
        return jax.jit(jax.value_and_grad(lambda t, b: lppo.lppo_loss(graphdef, chosen, params, t, b), has_aux=True))

    (anchored, stats), grads = loss(COEF)(state.trainable, dirty)
    (plain, without), slopes = loss(0.0)(state.trainable, batch)
    expected, added = by_hand(settings, state.trainable, rollout)
    np.testing.assert_allclose(stats["anchor"], expected, rtol=1e-4)
    np.testing.assert_allclose(anchored - plain, COEF * expected, rtol=1e-3)
    assert "anchor" not in without
    assert_same(jax.tree.map(lambda a, b: (a - b) / COEF, grads["policy"], slopes["policy"]), added)


def test_without_the_anchor_nothing_of_it_is_compiled():
    graphdef, params = toy.model()
    state = toy.state(params)
    plain, anchored = (
        lppo.build(graphdef, toy.settings(anchor_coef=coef)).rollout.eval_shape(
            params, state, *toy.inputs(), EXITS, RUN_KEY
        )
        for coef in (0.0, COEF)
    )
    assert plain.anchor_visual is None and anchored.anchor_visual.shape == anchored.visual.shape


def test_answers_of_the_default_exit_are_those_of_the_model_before_training():
    graphdef, params = toy.model()
    phases = ldistill.build(graphdef, toy.SETTINGS, "default")
    states = (toy.state(params), moved_state(toy.SETTINGS))
    first, second = (phases.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY) for state in states)
    np.testing.assert_array_equal(first.tokens, second.tokens)
    at_default = np.full(8, nnx.merge(graphdef, params).default_exit, np.int32)
    own = toy.phases(toy.SETTINGS).rollout(params, states[0], *toy.inputs(), at_default, RUN_KEY)
    np.testing.assert_array_equal(first.tokens, own.tokens)


@pytest.mark.parametrize("on", DISTILLED_ON)
def test_distillation_brings_every_exit_nearer_resumes_bit_for_bit_and_compiles_once(on):
    graphdef, params = toy.model()
    settings = toy.settings(exits="adaptive") if on == "policy" else toy.SETTINGS
    phases, state = ldistill.build(graphdef, settings, on), toy.state(params)
    drawer = exits.schedule(settings.exits, num_exits=4, default_exit=3)
    state = state._replace(controls=state.controls._replace(exits=drawer.initial_state()))
    losses, durations = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: durations.append(name) if name.endswith("backend_compile_duration") else None
    )

    def iterate(state, step):
        again = state._replace(iteration=np.zeros((), np.int32))  # the same draws each time: one batch, every exit
        rollout = phases.rollout(params, again, *toy.inputs(), np.roll(EXITS, step), RUN_KEY)
        failures = (rollout.exits == 2).astype(np.float32) if on == "policy" else None
        return phases.update(params, state, rollout, RUN_KEY, failures)

    for step in range(12):
        if step == 11:
            saved = jax.tree.map(np.array, state)
        state, metrics = iterate(state, step)
        losses.append(host_metrics(metrics)["loss/anchor_avg"])
        if step == 0:
            compiled = len(durations)
    assert len(durations) == compiled
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    resumed, _ = iterate(jax.tree.map(jnp.asarray, saved), 11)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
    if on == "policy":  # two of eight rows were at each exit, and those at exit 2 failed
        seen = 2 * (1 - 0.9**12) / 0.1
        np.testing.assert_allclose(state.controls.exits.requests, [seen] * 4, rtol=1e-5)
        np.testing.assert_allclose(state.controls.exits.failures, [0, seen, 0, 0], rtol=1e-5)


PROGRAM = """
import jax, numpy as np
from icet_jax.algorithms import ldistill, lppo, lrloo
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
settings = toy.settings(accumulation=1, anchor_coef=0.3)
key, exits = jax.random.key(0), np.array([1, 2, 3, 4] * 2, np.int32)

def run(algorithm, mesh, iterations):
    state, rows, counts = toy.state(params, settings), [], []
    weights = params if mesh is None else jax.device_put(params, shardings(params, mesh))
    state = state if mesh is None else jax.device_put(state, shardings(state, mesh))
    phases = {
        "lppo": lppo.build(graphdef, settings, mesh), "ldistill": ldistill.build(graphdef, settings, "policy", mesh),
        "lrloo": lrloo.build(graphdef, settings, 2, "grpo", mesh),
    }[algorithm]
    for _ in range(iterations):
        images, tokens, mask = toy.inputs()
        tokens, mask = place_rows((tokens, mask), mesh)
        rollout = phases.rollout(weights, state, images, tokens, mask, exits, key)
        if algorithm != "ldistill":
            scores = toy.token_score(rollout)
            state, batch, before = phases.prepare(weights, state, rollout, scores, np.ones(len(scores), bool))
            state, after = phases.update(weights, state, batch, key)
            rows.append(host_metrics(before, after))
        else:
            state, after = phases.update(weights, state, rollout, key)
            rows.append(host_metrics(after))
        counts.append(len(compiled))
    return rows, counts

for algorithm in ("lppo", "ldistill", "lrloo"):
    alone, _ = run(algorithm, None, 1)
    spread, counts = run(algorithm, make_mesh(data=2, fsdp=2), 3)
    assert "loss/anchor_avg" in alone[0]
    for name, value in alone[0].items():
        np.testing.assert_allclose(spread[0][name], value, rtol=2e-3, atol=2e-4, err_msg=name)
    assert counts[0] == counts[-1], counts
print("agreed")
"""


def test_a_mesh_of_four_learns_as_one_device_does():
    assert_agreed(PROGRAM, 4, timeout=900)
