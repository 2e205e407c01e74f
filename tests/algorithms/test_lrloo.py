"""L-RLOO on a toy LLaVA: losses and gradients by hand, one prefill per prompt, groups that learn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax.algorithms import lrloo
from icet_jax.algorithms.metrics import host_metrics
from icet_jax.config.names import GROUP_ADVANTAGES
from icet_jax.nn.protocols import Images
from tests.algorithms import references as ref
from tests.algorithms import toy
from tests.algorithms.by_hand import assert_same, log_softmax64, moved_state, one_row, pulled_back, row_logits

RUN_KEY = jax.random.key(0)
EXITS = np.array([1, 2, 3, 4, 1, 2, 3, 4], np.int32)
GROUP, KL_COEF, FACTORS = 2, 0.02, (1.0, 3.0, 1.0)
SETTINGS = toy.settings(normalise=False, missing_eos_penalty=0.5, kl_factors=FACTORS)


@functools.cache
def phases(settings, advantage):
    return lrloo.build(toy.model()[0], settings, GROUP, advantage)


def of_row(settings, policy, rollout, row, slopes=None):
    """One row alone, without padding: log-probs of its tokens in float64, and the gradients for slopes of these."""
    prompt = np.asarray(rollout.prompts)[row][np.asarray(rollout.prompt_mask)[row]]
    answer = np.asarray(rollout.tokens)[row][np.asarray(rollout.mask)[row]]
    tokens = jnp.asarray(np.concatenate([prompt, answer[:-1]]))[None]
    visual = one_row(rollout.visual, row)
    run = functools.partial(row_logits, policy, tokens, visual, scale=settings.lora_scale, answer=len(answer))
    every, kept = log_softmax64(run(), settings)
    place = np.arange(len(answer)), np.searchsorted(kept, answer)
    if slopes is None:
        return every[place]
    slopes = slopes[: len(answer)] / settings.sampling.temperature
    by_logit = np.zeros((len(answer), toy.TEXT.vocab_size), np.float32)
    by_logit[:, kept] = -slopes[:, None] * np.exp(every)
    by_logit[place[0], answer] += slopes
    return pulled_back(policy, tokens, visual, by_logit, scale=settings.lora_scale, answer=len(answer))


def by_hand(settings, advantage, policies, rollout, scores, rewarded, kinds):
    """(loss, gradients, rows that are compared) in numpy's float64, row by row.

    `policies` are those that sampled the responses, that are updated, and of the reference.
    """
    mask = np.asarray(rollout.mask)
    valid = mask.any(1) & np.isfinite(scores)
    log_probs = np.zeros((3, *mask.shape))
    for row in np.flatnonzero(valid):
        for number, policy in enumerate(policies):
            log_probs[number, row, : mask[row].sum()] = of_row(settings, policy, rollout, row)
    old, new, reference = log_probs
    last = np.asarray(rollout.tokens)[np.arange(len(mask)), np.maximum(mask.sum(1) - 1, 0)]
    rewards = scores - settings.missing_eos_penalty * (~np.isin(last, settings.sampling.eos_ids) & rewarded)
    coefs = KL_COEF * np.array(FACTORS)[kinds]
    if advantage == "rloo":
        rewards = rewards - coefs * ref.kl(old, reference, settings.kl_kind).sum(1)
    advantages, compared = ref.group_advantages(rewards, valid, GROUP, advantage == "grpo")
    mask = mask & compared[:, None]
    loss, slopes, _ = ref.policy_loss(new, old, advantages[:, None] + 0 * old, mask, settings.clip_range)
    if advantage == "grpo":
        weights = np.where(mask, coefs[:, None], 0) / mask.sum()
        loss += (weights * ref.kl(new, reference, "k3")).sum()
        slopes += weights * (1 - np.exp(reference - new))
    grads = [of_row(settings, policies[1], rollout, row, slopes[row]) for row in np.flatnonzero(compared)]
    return loss, functools.reduce(lambda one, other: jax.tree.map(jnp.add, one, other), grads), compared


@pytest.mark.parametrize(("advantage", "lora_scale"), [("rloo", 2.0), ("grpo", None)], ids=["rloo-lora", "grpo-full"])
def test_loss_and_gradients_by_hand(advantage, lora_scale):
    """Three groups: one with a response that has no score, one that nothing rewards, one with two images."""
    graphdef, params = toy.model()
    settings = dataclasses.replace(SETTINGS, lora_scale=lora_scale)
    state, run = moved_state(settings), phases(settings, advantage)
    rollout = run.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    rollout = rollout._replace(mask=rollout.mask & (np.arange(16) < 6)[:, None])
    scores = np.random.default_rng(0).normal(size=16).astype(np.float32)
    rewarded, kinds = np.arange(16) // 2 != 1, np.arange(16, dtype=np.int32) // 2 % 3
    scores[~rewarded], scores[1] = 0, np.nan
    _, batch, metrics = run.prepare(params, state, rollout, scores, np.zeros(16, bool), rewarded=rewarded, kinds=kinds)
    policies = [state.trainable["policy"], moved_state(settings, 4).trainable["policy"]]
    policies.append(toy.state(params, settings).trainable["policy"])  # not trained yet: the reference
    dirty = batch._replace(old_log_probs=jnp.where(batch.mask, batch.old_log_probs, jnp.nan))
    compute = jax.jit(jax.value_and_grad(lambda t: lrloo.lrloo_loss(graphdef, settings, params, t, dirty)[0]))
    loss, grads = compute({"policy": policies[1]})
    expected, slopes, compared = by_hand(settings, advantage, policies, rollout, scores, rewarded, kinds)
    np.testing.assert_array_equal(np.flatnonzero(compared), [2, 3, 4, 5])
    np.testing.assert_array_equal(np.asarray(batch.mask).any(1), compared)
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-5)
    assert_same(grads["policy"], slopes)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slopes)) > 1e-2
    assert host_metrics(metrics)["objective/unscored"] == 1


def repeated(images, tokens, mask):
    """The same rows, each twice, as a batch without groups has them."""
    owners = np.asarray(images.rows)[:-1]
    order = [number for row in range(8) for _ in range(GROUP) for number in np.flatnonzero(owners == row)]
    rows = [2 * row + copy for row in range(8) for copy in range(GROUP) for _ in range((owners == row).sum())]
    many = Images(
        pixels=jnp.concatenate([images.pixels[jnp.asarray(order)], images.pixels[-1:]]),
        rows=jnp.asarray([*rows, 16], jnp.int32), num_rows=16, per_row=2,
    )  # fmt: skip
    return many, np.repeat(tokens, GROUP, 0), np.repeat(mask, GROUP, 0)


def test_one_prefill_gives_the_responses_of_separate_rows():
    _, params = toy.model()
    state, inputs = toy.state(params, value_head=False), toy.inputs()
    grouped = phases(SETTINGS, "rloo").rollout(params, state, *inputs, EXITS, RUN_KEY)
    alone = toy.phases(toy.SETTINGS).rollout(params, state, *repeated(*inputs), np.repeat(EXITS, GROUP), RUN_KEY)
    for name in ("prompts", "prompt_mask", "exits", "tokens", "mask"):
        np.testing.assert_array_equal(getattr(grouped, name), getattr(alone, name), err_msg=name)
    np.testing.assert_allclose(grouped.log_probs, alone.log_probs, atol=1e-5)
    real = np.asarray(grouped.mask).any(1)
    np.testing.assert_allclose(grouped.visual[real], alone.visual[real], rtol=1e-5, atol=1e-5)
    tokens = np.asarray(grouped.tokens)[real]
    assert np.any(tokens[::GROUP] != tokens[1::GROUP], axis=1).sum() >= 5  # each row has a key of its own


@pytest.mark.parametrize("advantage", GROUP_ADVANTAGES)
def test_a_toy_reward_is_learnt_resumes_bit_for_bit_and_compiles_once(advantage):
    _, params = toy.model()
    run, state, rows, durations = phases(SETTINGS, advantage), toy.state(params, value_head=False), [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: durations.append(name) if name.endswith("backend_compile_duration") else None
    )

    def iterate(state, step):
        rollout = run.rollout(params, state, *toy.inputs(step % 3), np.roll(EXITS, step), RUN_KEY)
        state, batch, before = run.prepare(params, state, rollout, toy.token_score(rollout), np.ones(16, bool))
        state, after = run.update(params, state, batch, RUN_KEY)
        return state, host_metrics(before, after)

    for step in range(24):
        if step == 23:
            saved = jax.tree.map(np.array, state)
        state, row = iterate(state, step)
        rows.append(row)
        if step == 0:
            compiled = len(durations)
    assert len(durations) == compiled
    scores = [row["objective/scores"] for row in rows]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.2
    assert rows[0]["objective/kl"] == 0 < row["objective/kl"] and ("loss/kl_avg" in row) == (advantage == "grpo")
    assert rows[0]["train/updates"] == 4 and row["val/group_std"] > 0 and 0 <= row["val/flat_groups"] <= 1
    assert not {"loss/value_avg", "val/explained_variance"} & row.keys()
    resumed, _ = iterate(jax.tree.map(jnp.asarray, saved), 23)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
