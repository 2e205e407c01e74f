"""L-DPO: its loss is that of the paper at the row's exit, and it prefers the chosen answers at every exit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.algorithms import ldpo
from icet_jax.algorithms.losses import dpo_loss
from icet_jax.algorithms.metrics import host_metrics
from icet_jax.algorithms.phases import encode_visual
from tests.algorithms import references, toy
from tests.algorithms.test_anchor import assert_same, log_softmax64, moved_state, one_row, pulled_back, row_logits
from tests.devices import assert_agreed

RUN_KEY = jax.random.key(0)
EXITS = np.array([1, 2, 3, 4, 1, 2, 3, 4], np.int32)
BETA, SFT = 0.4, 0.3
PAIRED = (0, 2)  # rows with a pair; one has one image, the other two
ANSWERS = {0: ([5, 6, 7, toy.EOS], [8, toy.EOS]), 2: ([9, toy.EOS], [10, 11, 5, 4, 3])}


def answers(rows):
    """(tokens, mask) of a pair in each of `rows`; others have none."""
    empty: list[int] = []
    ids = [text for row in range(toy.ROWS) for text in (ANSWERS[rows[row]] if row in rows else (empty, empty))]
    return ldpo.pad_answers(ids, length=toy.NEW_TOKENS)


def batch_of(graphdef, params, settings):
    """A batch with the pairs of `PAIRED`, and the reference's log-probs of nothing yet."""
    images, tokens, mask = toy.inputs()
    padded, answer_mask = answers({row: row for row in PAIRED})
    visual = jax.jit(lambda p: encode_visual(nnx.merge(graphdef, p), images, jnp.asarray(EXITS)))(params)
    has_pair = answer_mask.any(axis=2).all(axis=1, keepdims=True)
    batch = ldpo.PairBatch(*jax.tree.map(jnp.asarray, (tokens, mask, visual, padded, answer_mask, has_pair)))
    reference = jax.jit(lambda p, b: ldpo._answer_log_probs(nnx.merge(graphdef, p), None, settings, b))(params, batch)
    # What lies outside the pairs is nobody's.
    return batch._replace(ref_log_probs=jnp.where(batch.mask, reference, jnp.nan))


def by_hand(settings, policy, before, batch):
    """(DPO term, SFT term, gradient of DPO + SFT x the SFT term, margins): float64 on every answer alone.

    `before` is the policy before training, which is the reference. Slopes are pulled back through the network one by
    one.
    """
    gaps, likelihoods, slopes, inputs = {}, [], {}, {}
    for row in PAIRED:
        prompt = np.asarray(batch.prompts)[row][np.asarray(batch.prompt_mask)[row]]
        for which, ids in enumerate(map(np.array, ANSWERS[row])):
            tokens = jnp.asarray(np.concatenate([prompt, ids[:-1]]))[None].astype(jnp.int32)
            arguments = (tokens, one_row(batch.visual, row))
            static = {"scale": settings.lora_scale, "answer": len(ids)}
            own, kept = log_softmax64(row_logits(policy, *arguments, **static), settings)
            reference, _ = log_softmax64(row_logits(before, *arguments, **static), settings)
            places = (np.arange(len(ids)), np.searchsorted(kept, ids))
            likelihoods += [own[places].mean()] if which == 0 else []
            gaps[row, which] = own[places].sum() - reference[places].sum()
            slope = np.zeros((len(ids), toy.TEXT.vocab_size))
            slope[:, kept] = -np.exp(own)
            slope[np.arange(len(ids)), ids] += 1
            slopes[row, which], inputs[row, which] = slope / settings.sampling.temperature, (arguments, static)
    margins = {row: BETA * (gaps[row, 0] - gaps[row, 1]) for row in PAIRED}
    dpo = np.mean([np.log1p(np.exp(-margin)) for margin in margins.values()])
    grads = jax.tree.map(jnp.zeros_like, policy)
    for (row, which), slope in slopes.items():
        weight = -BETA / (1 + np.exp(margins[row])) * (1, -1)[which]
        weight -= SFT / len(ANSWERS[row][0]) if which == 0 else 0
        arguments, static = inputs[row, which]
        weighted = (weight / len(PAIRED) * slope).astype(np.float32)
        grads = jax.tree.map(jnp.add, grads, pulled_back(policy, *arguments, weighted, **static))
    return dpo, -np.mean(likelihoods), grads, margins


@pytest.mark.parametrize("lora_scale", [2.0, None], ids=["lora", "full"])
def test_the_loss_and_its_gradient_are_those_of_every_answer_alone(lora_scale):
    graphdef, params = toy.model()
    settings = toy.settings(lora_scale=lora_scale)
    state, batch = moved_state(settings), batch_of(graphdef, params, settings)
    compute = jax.jit(
        jax.value_and_grad(
            lambda t: ldpo.ldpo_loss(graphdef, settings, BETA, SFT, params, t, batch), has_aux=True
        )
    )  # fmt: skip
    (loss, stats), grads = compute({"policy": state.trainable["policy"]})
    fresh = toy.state(params, settings).trainable["policy"]  # adapters that change nothing, or the model's own weights
    dpo, sft, slopes, margins = by_hand(settings, state.trainable["policy"], fresh, batch)
    assert min(map(abs, margins.values())) > 0.01
    np.testing.assert_allclose([stats["dpo"], stats["sft"], loss], [dpo, sft, dpo + SFT * sft], rtol=1e-4)
    np.testing.assert_allclose(stats["margins"], np.mean(list(margins.values())), rtol=1e-3)
    assert_same(grads["policy"], slopes)
    (_, stats), _ = compute({"policy": fresh})
    np.testing.assert_allclose([stats["dpo"], stats["margins"]], [np.log(2), 0], atol=1e-5)


def test_the_loss_of_numbers_is_that_of_its_formula_whatever_stands_where_no_pair_is():
    (log_probs, reference, *_), _, rng = references.random_case(0, rows=9, length=2)
    mask = np.arange(9) % 3 != 0
    expected, gradient, stats = references.dpo_loss(5 * log_probs, 5 * reference, mask, BETA)
    dirty = [references.poison(5 * x, np.repeat(mask[:, None], 2, 1), rng) for x in (log_probs, reference)]
    (loss, found), slopes = jax.value_and_grad(lambda x: dpo_loss(x, dirty[1], mask, beta=BETA), has_aux=True)(
        jnp.asarray(dirty[0])
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(slopes, gradient, rtol=1e-4, atol=1e-7)
    assert set(found) == set(stats)
    for name, value in stats.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    nothing, found = dpo_loss(dirty[0], dirty[1], np.zeros(9, bool), beta=BETA)
    assert nothing == 0 and not any(found.values())


def test_every_exit_learns_to_prefer_resumes_bit_for_bit_and_compiles_once():
    graphdef, params = toy.model()
    update, state = ldpo.build(graphdef, toy.SETTINGS, beta=BETA, sft_coef=SFT), toy.state(params)
    every = answers({row: PAIRED[row % 2] for row in range(toy.ROWS)})
    rows, durations = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: durations.append(name) if name.endswith("backend_compile_duration") else None
    )
    for step in range(12):
        if step == 11:
            saved = jax.tree.map(np.array, state)
        state, metrics = update(params, state, *toy.inputs(), np.roll(EXITS, step), *every, RUN_KEY)
        rows.append(host_metrics(metrics))
        if step == 0:
            compiled = len(durations)
    assert len(durations) == compiled
    assert rows[0]["loss/dpo_avg"] > 0.3 > rows[-1]["loss/dpo_avg"] and rows[-1]["rewards/accuracies"] == 1
    assert rows[-1]["rewards/margins"] == pytest.approx(
        rows[-1]["rewards/chosen"] - rows[-1]["rewards/rejected"], rel=1e-5
    )
    assert rows[0]["train/updates"] == 4 and int(state.iteration) == 12
    resumed, _ = update(
        params, jax.tree.map(jnp.asarray, saved), *toy.inputs(), np.roll(EXITS, 11), *every, RUN_KEY
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, resumed, state)


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize(
    ("text", "ids"), [("5 6", [5, 6, 2]), ("", [2]), ("5 6 7", [5, 6, 7]), ("5 6 7 8", None)]
)  # fmt: skip
def test_an_answer_ends_with_eos_unless_it_was_cut(text, ids):
    assert ldpo.answer_ids(Words(), text, eos_id=2, length=3) == ids


PROGRAM = """
import jax, numpy as np
from icet_jax.algorithms import ldpo
from icet_jax.algorithms.metrics import host_metrics
from icet_jax.parallel.mesh import make_mesh
from icet_jax.parallel.sharding import place_rows, shardings
from tests.algorithms import toy
from tests.algorithms.test_ldpo import EXITS, PAIRED, RUN_KEY, answers

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
)
graphdef, params = toy.model()
settings = toy.settings(accumulation=1)
every = answers({row: PAIRED[row % 2] for row in range(toy.ROWS)})

def run(mesh, iterations):
    state, rows, counts = toy.state(params, settings), [], []
    weights = params if mesh is None else jax.device_put(params, shardings(params, mesh))
    state = state if mesh is None else jax.device_put(state, shardings(state, mesh))
    update = ldpo.build(graphdef, settings, beta=0.4, sft_coef=0.3, mesh=mesh)
    for _ in range(iterations):
        images, tokens, mask = toy.inputs()
        tokens, mask = place_rows((tokens, mask), mesh)
        state, after = update(weights, state, images, tokens, mask, EXITS, *every, RUN_KEY)
        rows.append(host_metrics(after))
        counts.append(len(compiled))
    return rows, counts

alone, _ = run(None, 1)
spread, counts = run(make_mesh(data=2, fsdp=2), 3)
for name, value in alone[0].items():
    np.testing.assert_allclose(spread[0][name], value, rtol=2e-3, atol=2e-4, err_msg=name)
assert counts[0] == counts[-1], counts
print("agreed")
"""


def test_a_mesh_of_four_prefers_as_one_device_does():
    assert_agreed(PROGRAM, 4, timeout=900)
