"""The phases of L-PPO and L-SFT on a toy LLaVA."""

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.algorithms import lppo, lsft, rollouts
from icet_jax.algorithms import phases as shared_phases
from icet_jax.algorithms.forward import TokenValues, with_policy
from icet_jax.algorithms.metrics import host_metrics, instability
from icet_jax.algorithms.state import pure_dict
from icet_jax.algorithms.updates import gradients, shuffled_order, take_rows
from icet_jax.errors import UserError
from tests.algorithms import toy
from tests.algorithms.by_hand import moved_state
from tests.algorithms.references import whiten_cells

RUN_KEY = jax.random.key(0)
EXITS = np.array([1, 2, 3, 4, 1, 2, 3, 4], np.int32)


@pytest.fixture(scope="module")
def model():
    return toy.model()


def iterate(phases, params, state, exits=EXITS, seed=0, score=toy.token_score):
    rollout = phases.rollout(params, state, *toy.inputs(seed), exits, RUN_KEY)
    state, batch, metrics = phases.prepare(params, state, rollout, score(rollout), np.ones(toy.ROWS, bool))
    state, more = phases.update(params, state, batch, RUN_KEY)
    return state, rollout, host_metrics(metrics, more)


def moved(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


@pytest.mark.parametrize("lora_scale", [2.0, None], ids=["lora", "full"])
def test_before_the_first_update_ratio_is_one_and_kl_zero(model, lora_scale):
    """With the rollout's temperature (0.7) in every pass: TRL's rule."""
    graphdef, params = model
    settings = toy.settings(lora_scale=lora_scale)
    phases, state = toy.phases(settings), toy.state(params, settings)
    rollout = phases.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    _, batch, metrics = phases.prepare(params, state, rollout, toy.token_score(rollout), np.ones(8, bool))
    row = host_metrics(metrics)
    assert row["objective/kl"] == 0 and row["objective/non_score_reward"] == 0
    assert row["val/sampler_gap"] < 1e-5
    _, stats = jax.jit(lambda *a: lppo.lppo_loss(graphdef, settings, *a))(params, state.trainable, batch)
    assert abs(stats["ratio"] - 1) < 1e-6 and stats["ratio_var"] < 1e-10
    assert stats["approxkl"] < 1e-10 and stats["clipfrac"] == 0


def test_the_rollout_keeps_the_contract(model):
    graphdef, params = model
    phases = toy.phases(toy.SETTINGS)
    rollout = phases.rollout(params, toy.state(params), *toy.inputs(), EXITS, RUN_KEY)
    mask, tokens = np.asarray(rollout.mask), np.asarray(rollout.tokens)
    assert not mask[-1].any() and mask[:-1, 0].all()  # the filler row is empty
    assert np.all(mask[:, 1:] <= mask[:, :-1])
    # The image placeholder in a response would give the next pass too many image positions.
    assert not np.isin(tokens[mask], [toy.IMAGE, toy.PAD]).any()


def test_the_exit_matters_where_there_is_an_image_and_only_there(model):
    graphdef, params = model
    phases = toy.phases(toy.SETTINGS)
    first, last = (
        phases.rollout(params, toy.state(params), *toy.inputs(), np.full(toy.ROWS, layer, np.int32), RUN_KEY)
        for layer in (1, 4)
    )
    changed = np.any(np.asarray(first.log_probs != last.log_probs), axis=1)
    np.testing.assert_array_equal(changed, [True, False, True, True, True, False, True, False])


def test_drawing_every_exit_compiles_nothing_after_the_first_iteration(model):
    graphdef, params = model
    phases, state = toy.phases(toy.SETTINGS), toy.state(params)
    durations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: durations.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    draw = dict(batch=toy.ROWS, num_exits=4, default_exit=3)
    state, *_ = iterate(phases, params, state, shared_phases.draw_exits(toy.SETTINGS, RUN_KEY, state.iteration, **draw))
    compiled = len(durations)
    assert compiled > 0
    for exit_layer in range(1, 5):
        drawn = shared_phases.draw_exits(toy.SETTINGS, RUN_KEY, state.iteration, **draw)
        assert drawn.shape == (toy.ROWS,)
        state, _, row = iterate(phases, params, state, np.full(toy.ROWS, exit_layer, np.int32), seed=exit_layer)
        assert {name for name in row if name.startswith("exit/")} == {f"exit/{exit_layer}/kl"}
    assert len(durations) == compiled


def test_accumulation_gives_the_same_gradients(model):
    """Slices of unequal token counts: weighting by tokens, not by slices."""
    graphdef, params = model
    phases, state = toy.phases(toy.SETTINGS), toy.state(params)
    rollout = phases.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    rng = np.random.default_rng(0)
    _, batch, _ = phases.prepare(params, state, rollout, rng.normal(size=8), np.ones(8, bool))
    lengths = rng.permutation([0, 1, 2, 3, 4, 5, 5, 1])
    batch = batch._replace(mask=batch.mask & (np.arange(5) < lengths[:, None]))
    trainable = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), state.trainable)

    def loss(trainable, rows):
        return lppo.lppo_loss(graphdef, toy.settings(entropy_coef=0.1), params, trainable, rows)

    (whole,), (sliced,) = (shuffled_order(RUN_KEY, rows=8, epochs=1, minibatches=1, accumulation=n) for n in (1, 4))
    results = [
        jax.jit(lambda slices: gradients(loss, trainable, batch, batch.mask.sum(1), slices))(slices)
        for slices in (whole, sliced)
    ]
    whole, sliced = ((loss, grads) for loss, _, grads in results)
    for mine, theirs in zip(jax.tree.leaves(sliced), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_masked_garbage_does_not_reach_the_gradients(model):
    graphdef, params = model
    phases, state = toy.phases(toy.SETTINGS), toy.state(params)
    rollout = phases.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    _, batch, _ = phases.prepare(params, state, rollout, np.arange(8.0), np.ones(8, bool))
    batch = batch._replace(mask=batch.mask & (np.arange(5) < 3))

    def poisoned(x):
        return jnp.where(batch.mask, x, jnp.nan)

    dirty = batch._replace(
        responses=jnp.where(batch.mask, batch.responses, 11),
        old_log_probs=poisoned(batch.old_log_probs),
        old_values=poisoned(batch.old_values),
        advantages=poisoned(batch.advantages),
        returns=poisoned(batch.returns),
    )
    grad = jax.jit(jax.grad(lambda t, b: lppo.lppo_loss(graphdef, toy.SETTINGS, params, t, b)[0]))
    for mine, theirs in zip(
        jax.tree.leaves(grad(state.trainable, dirty)), jax.tree.leaves(grad(state.trainable, batch)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("lora_scale", [2.0, None], ids=["lora", "full"])
def test_only_the_policy_and_the_value_head_move(model, lora_scale):
    graphdef, params = model
    settings = toy.settings(lora_scale=lora_scale)
    before = jax.device_get(pure_dict(params))
    state = toy.state(params, settings)
    start = jax.device_get(state.trainable)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(start))
    state, _, row = iterate(toy.phases(settings), params, state)
    assert row["train/updates"] == 4 == int(state.updates)
    assert moved(start["policy"], state.trainable["policy"]) > 0
    assert moved(start["value_head"], state.trainable["value_head"]) > 0
    assert moved(before, pure_dict(params)) == 0
    merged, lora = with_policy(params, state.trainable, lora_scale)
    frozen = {name: merged[name] for name in ("vision_tower", "projector")}
    assert moved({name: before[name] for name in frozen}, frozen) == 0
    assert (lora is None) == (lora_scale is None)


def test_a_toy_reward_is_learned(model):
    _, params = model
    phases, state, scores = toy.phases(toy.SETTINGS), toy.state(params), []
    for _ in range(30):
        state, _, row = iterate(phases, params, state)
        scores.append(row["objective/scores"])
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.3
    assert row["objective/kl"] > 0


@pytest.mark.parametrize("lora_scale", [2.0, None], ids=["lora", "full"])
def test_bfloat16_trains_float32_weights_and_forms_no_logits_of_whole_responses(lora_scale):
    """Traced only: the state keeps its shapes and dtypes, and logits exist for `log_prob_chunk` positions at a time."""
    settings = toy.settings(lora_scale=lora_scale)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: toy.llava(jnp.bfloat16)))
    state = jax.eval_shape(lambda params: toy.state(params, settings), params)
    phases = lppo.build(graphdef, settings)
    rollout = jax.eval_shape(phases.rollout, params, state, *toy.inputs(), EXITS, RUN_KEY)
    scores, every = np.zeros(8, np.float32), np.ones(8, bool)
    _, batch, _ = jax.eval_shape(lambda *args: phases.prepare(*args, scores, every), params, state, rollout)
    jaxpr, (after, _) = jax.make_jaxpr(phases.update, return_shape=True)(params, state, batch, RUN_KEY)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert batch.visual.dtype == jnp.bfloat16
    positions = {shape[-2] for shape in shapes(jaxpr.jaxpr) if shape[-1:] == (32,) and len(shape) > 2}
    assert max(positions) == settings.log_prob_chunk


def shapes(jaxpr):
    """Shapes of every intermediate value, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes(getattr(inner, "jaxpr", inner))


def test_unscored_rows_train_nothing(model):
    graphdef, params = model
    phases, state = toy.phases(toy.SETTINGS), toy.state(params)
    rollout = phases.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    scores = np.array([1, np.nan, 2, np.nan, 0, 1, 1, np.nan], np.float32)
    state, batch, metrics = phases.prepare(params, state, rollout, scores, np.ones(8, bool))
    row = host_metrics(metrics)
    assert row["objective/unscored"] == 2 and row["objective/scores"] == 1
    assert not np.asarray(batch.mask)[[1, 3, 7]].any() and state.controls.normaliser.seen == 5
    np.testing.assert_array_equal(np.isfinite(batch.advantages), True)


def test_rows_that_are_not_rewarded_learn_from_the_kl_alone(model):
    """Before the first update KL and values are zero: nothing may move such a row, whatever the others score."""
    _, params = model
    settings = toy.settings(normalise=False, missing_eos_penalty=1.0)
    state = toy.state(params, settings)
    rollout = toy.phases(toy.SETTINGS).rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    scores = np.array([-2, -2, -3, -4, 0, 0, 0, 0], np.float32)
    rewarded = np.arange(8) < 4
    arguments = (params, state, rollout, scores, np.zeros(8, bool))
    _, batch, _ = toy.phases(settings).prepare(*arguments, rewarded=rewarded)
    advantages, mask = np.asarray(batch.advantages), np.asarray(batch.mask)
    assert mask[4:7].any(1).all() and not advantages[4:].any() and not np.asarray(batch.returns)[4:].any()
    among = advantages[:4][mask[:4]]
    np.testing.assert_allclose([among.mean(), among.std()], [0, 1], atol=1e-5)
    _, everyone, _ = toy.phases(settings).prepare(*arguments)  # all rows, unless told otherwise
    assert np.asarray(everyone.advantages)[4:7].any()


KINDS = np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)


def test_the_kl_of_a_kind_has_its_factor(model):
    """With gamma = lambda = 1 and no values a token's advantage is the sum of the rewards from there on."""
    graphdef, params = model
    plain = toy.settings(normalise=False, whiten_advantages=False, lam=1.0)
    state = moved_state(plain)
    rollout = toy.phases(plain).rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    arguments = (params, state, rollout, np.arange(8.0), np.zeros(8, bool))
    _, whole, _ = toy.phases(plain).prepare(*arguments, kinds=KINDS)
    _, batch, _ = toy.phases(dataclasses.replace(plain, kl_factors=(1.0, 0.0, 3.0))).prepare(*arguments, kinds=KINDS)
    scores = np.where(whole.mask, np.arange(8.0)[:, None], 0)
    kl = np.asarray(whole.returns) - scores
    assert np.abs(kl[1:7]).max(1).all()
    np.testing.assert_array_equal(batch.returns[KINDS == 0], whole.returns[KINDS == 0])
    np.testing.assert_array_equal(batch.returns[KINDS == 1], scores[KINDS == 1])
    np.testing.assert_allclose((batch.returns - scores)[KINDS == 2], 3 * kl[KINDS == 2], rtol=1e-4, atol=1e-5)


def test_a_baseline_of_each_exit_and_kind(model):
    _, params = model
    raw = toy.settings(normalise=False, whiten_advantages=False, lam=1.0)
    state = toy.state(params, raw)
    rollout = toy.phases(raw).rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    exits, kinds = np.array([1, 1, 1, 2, 2, 2, 2, 1], np.int32), np.array([0, 0, 0, 0, 0, 1, 2, 0], np.int32)
    rollout, rewarded = rollout._replace(exits=jnp.asarray(exits)), np.arange(8) != 2
    arguments = (params, state, rollout, np.arange(8.0) ** 2, np.zeros(8, bool))
    _, before, _ = toy.phases(raw).prepare(*arguments, rewarded=rewarded, kinds=kinds)
    by_cell = toy.settings(normalise=False, lam=1.0, baseline="exit_kind", baseline_min_rows=2, baseline_min_std=0.4)
    _, after, _ = toy.phases(by_cell).prepare(*arguments, rewarded=rewarded, kinds=kinds)
    want = whiten_cells(np.asarray(before.advantages, float), np.asarray(before.mask), exits, kinds, 2, 0.4, rewarded)
    np.testing.assert_allclose(after.advantages, want, rtol=1e-4, atol=1e-5)


def test_nan_stops_the_run_and_leaves_the_weights(model):
    graphdef, params = model
    phases, state = toy.phases(toy.SETTINGS), toy.state(params)
    rollout = phases.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    state, batch, _ = phases.prepare(params, state, rollout, np.ones(8), np.ones(8, bool))
    before = jax.device_get(state.trainable)
    batch = batch._replace(advantages=batch.advantages.at[0, 0].set(jnp.nan))
    state, metrics = phases.update(params, state, batch, RUN_KEY)
    row = host_metrics(metrics)
    assert row["train/updates"] < 4 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trainable))
    if row["train/updates"] == 0:
        assert moved(before, state.trainable) == 0
    assert instability(row) == "the loss or its gradient is NaN or infinite"


def test_a_rollout_beyond_max_kl_moves_nothing(model):
    _, params = model
    phases, start = toy.phases(toy.settings(max_kl=1.0)), toy.state(params)
    policy, head = start.trainable["policy"], start.trainable["value_head"]
    noise = jax.tree.map(lambda x: 5 * jax.random.normal(jax.random.key(1), x.shape), policy)
    for far, taught in ((policy, True), (noise, False)):
        state = start._replace(trainable={"policy": far, "value_head": head})
        before = jax.device_get(state)
        rollout = phases.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
        state, batch, metrics = phases.prepare(params, state, rollout, np.ones(8), np.ones(8, bool))
        state, more = phases.update(params, state, batch, RUN_KEY)
        row = host_metrics(metrics, more)
        assert (row["objective/kl"] <= 1) == taught and (row["train/updates"] > 0) == taught
        assert (instability(row) is None) == taught and int(state.iteration) == 1
        if not taught:
            assert "beyond config.lppo.max_kl" in instability(row)
            assert "objective/kl" in row and not {"val/ratio", "loss/total_avg", "train/grad_norm"} & row.keys()
            assert moved(before.trainable, state.trainable) == 0 and moved(before.opt_state, state.opt_state) == 0


def test_controls_stay_numbers(model):
    _, params = model
    phases, state = toy.phases(toy.settings(kl_adaptive=True)), toy.state(params)
    rollout = phases.rollout(params, state, *toy.inputs(), EXITS, RUN_KEY)
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.trainable)
    controls = jax.device_get(state.controls)
    state, batch, metrics = phases.prepare(params, state._replace(trainable=bad), rollout, np.ones(8), np.ones(8, bool))
    assert not np.asarray(batch.mask).any() and host_metrics(metrics)["train/unstable"]
    assert float(state.controls.kl_coef) == float(controls.kl_coef)


@pytest.mark.parametrize("guard", [{"target_kl": 1e-6}, {"max_ratio": 1.001}], ids=["target_kl", "max_ratio"])
def test_a_guard_skips_the_remaining_updates(model, guard):
    _, params = model
    stopping = dataclasses.replace(toy.phases(toy.SETTINGS), update=toy.phases(toy.settings(epochs=4, **guard)).update)
    state, _, row = iterate(stopping, params, toy.state(params))
    assert row["policy/early_stop"] == 1 and 1 <= row["train/updates"] < 8
    assert int(state.updates) == row["train/updates"]


def test_the_dual_clip_of_the_settings_bounds_the_loss(model, monkeypatch):
    graphdef, params = model
    shape, whole = (toy.ROWS, toy.NEW_TOKENS), jnp.zeros((toy.ROWS, 4), jnp.int32)
    zero, one = jnp.zeros(shape), jnp.ones(shape)
    monkeypatch.setattr(rollouts, "evaluate_policy", lambda *_, **__: TokenValues(5 * one, zero, zero))
    batch = lppo.TrainBatch(
        prompts=whole, prompt_mask=whole > 0, visual=None, responses=one.astype(jnp.int32), mask=one > 0,
        old_log_probs=zero, old_values=zero, advantages=-one, returns=zero,
    )  # fmt: skip
    trainable = toy.state(params).trainable
    losses = [
        lppo.lppo_loss(graphdef, toy.settings(dual_clip=bound), params, trainable, batch)[0] for bound in (0.0, 3.0)
    ]
    np.testing.assert_allclose(losses, [np.exp(5), 3], rtol=1e-5)


def test_adaptive_coefficient_moves_after_the_rewards(model):
    _, params = model
    state, _, row = iterate(toy.phases(toy.SETTINGS), params, toy.state(params))
    np.testing.assert_allclose(row["objective/kl_coef"], 0.02)
    np.testing.assert_allclose(state.controls.kl_coef, 0.02 * (1 - 0.2 * 7 / 100), rtol=1e-6)


@pytest.mark.parametrize("lora_scale", [2.0, None], ids=["lora", "full"])
def test_restored_state_continues_bit_for_bit(model, lora_scale):
    graphdef, params = model
    settings = toy.settings(lora_scale=lora_scale)
    phases, state = toy.phases(settings), toy.state(params, settings)
    state, *_ = iterate(phases, params, state)
    saved = jax.tree.map(np.array, state)
    straight, *_ = iterate(phases, params, state, seed=1)
    resumed, *_ = iterate(phases, params, jax.tree.map(jnp.asarray, saved), seed=1)
    jax.tree.map(np.testing.assert_array_equal, resumed, straight)


def drawn(minibatches, accumulation, *, key=RUN_KEY, epochs=3):
    """The row numbers of every mini-batch, [epochs, mini-batches, rows], and of every slice."""
    order = shuffled_order(key, rows=24, epochs=epochs, minibatches=minibatches, accumulation=accumulation)
    assert order.shape == (epochs * minibatches, accumulation, 24 // (minibatches * accumulation))
    slices = jax.vmap(jax.vmap(lambda chosen: take_rows(jnp.arange(24), chosen)))(order)
    return np.sort(slices.reshape(epochs, minibatches, -1)), np.asarray(slices)


def test_every_epoch_has_its_own_mini_batches_and_takes_every_row_once():
    """lm-human-preference-details used one key, hence one order, for all epochs."""
    for minibatches, accumulation in ((1, 4), (2, 1), (2, 3), (4, 2)):
        found, _ = drawn(minibatches, accumulation)
        np.testing.assert_array_equal(np.sort(found.reshape(3, 24)), np.tile(np.arange(24), (3, 1)))
        different = {part.tobytes() for part in found[:, 0]}
        assert len(different) == (1 if minibatches == 1 else 3)


def test_a_mini_batch_does_not_depend_on_its_slices():
    """A run may have fewer on more devices."""
    whole, _ = drawn(2, 1)
    for accumulation in (2, 3, 6):
        found, slices = drawn(2, accumulation)
        np.testing.assert_array_equal(found, whole)
        parts = slices // (2 * accumulation)  # where a row lies
        np.testing.assert_array_equal(parts, np.broadcast_to(np.arange(12 // accumulation), parts.shape))


def test_every_row_is_as_likely_in_every_mini_batch():
    keys = jax.random.split(RUN_KEY, 3000)
    order = jax.vmap(lambda key: shuffled_order(key, rows=6, epochs=1, minibatches=3, accumulation=1))(keys)
    order = order.reshape(3000, 3, 2)
    counts = np.array([(order == row).sum(axis=0) for row in range(3)])
    np.testing.assert_allclose(counts, 1000, atol=130)  # five standard deviations
    both = np.asarray(order[:, 0, 0] == order[:, 0, 1]).sum()  # neighbours are drawn each for themselves
    np.testing.assert_allclose(both, 1000, atol=130)


def test_a_batch_that_does_not_divide_is_refused(model):
    _, params = model
    prepare_arrays = toy.phases(toy.settings(minibatches=3)).prepare_arrays
    uneven = dataclasses.replace(toy.phases(toy.SETTINGS), prepare_arrays=prepare_arrays)
    with pytest.raises(UserError, match="batch_size 8 does not divide into 3 mini-batches"):
        iterate(uneven, params, toy.state(params))


def test_lsft_learns_its_targets_at_every_exit(model):
    graphdef, params = model
    settings = toy.SETTINGS
    update, state = lsft.build(graphdef, settings), toy.state(params, settings)
    ids = [[5, 6, 7], [8], None, [5, 6, 7], [5, 6, 7, 9], [8], [9], [4]]
    targets, target_mask = lsft.pad_targets(ids, eos_id=toy.EOS, length=toy.NEW_TOKENS, pad_id=toy.PAD)
    np.testing.assert_array_equal(targets[1], [8, toy.EOS, toy.PAD, toy.PAD, toy.PAD])
    np.testing.assert_array_equal(target_mask.sum(1), [4, 2, 0, 4, 5, 2, 2, 2])
    before, rows = jax.device_get(state.trainable["value_head"]), []
    for step in range(12):
        exits = np.full(toy.ROWS, 1 + step % 4, np.int32)
        state, metrics = update(params, state, *toy.inputs(), exits, targets, target_mask, RUN_KEY)
        rows.append(host_metrics(metrics))
    assert rows[-1]["loss/policy_avg"] < 0.7 * rows[0]["loss/policy_avg"]
    assert rows[0]["train/updates"] == 4 and int(state.iteration) == 12
    assert moved(before, state.trainable["value_head"]) == 0
    policy, lora = with_policy(params, state.trainable, settings.lora_scale)
    assert lora is not None and nnx.merge(graphdef, policy).num_exits == 4


def test_a_target_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="row 1: 5 tokens . EOS exceed"):
        lsft.pad_targets([[1], [1] * 5], eos_id=2, length=5, pad_id=0)
