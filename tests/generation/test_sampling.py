"""The sampling distribution against numpy, and log-probs in chunks against the whole matrix at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.generation.sampling import (
    Sampling,
    process_logits,
    sample_tokens,
    suppress_ids,
    token_log_probs,
    truncate_logits,
)
from icet_jax.nn.protocols import VisionLanguageModel

VOCAB = 23


def softmax(x):
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def reference_distribution(logits, temperature, suppressed, top_k, top_p):
    """Probabilities of one row, written with sorting and loops (HF's order: temperature, top-k, top-p)."""
    probabilities = softmax(logits / temperature)
    probabilities[list(suppressed)] = 0
    order = np.argsort(-probabilities)
    kept = list(order if top_k == 0 else order[:top_k])
    mass, nucleus = 0.0, []
    total = probabilities[kept].sum()
    for token in kept:
        nucleus.append(token)
        mass += probabilities[token] / total
        if mass >= top_p:
            break
    out = np.zeros(len(logits))
    out[nucleus] = probabilities[nucleus]
    return out / out.sum()


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (7, 0.6), (1, 1.0), (0, 1e-6), (100, 0.95)])
def test_truncation_equals_a_numpy_reference(top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(4, VOCAB)).astype(np.float32) * 2
    processed = truncate_logits(process_logits(jnp.asarray(logits), 0.7, (3, 8)), top_k, top_p)
    for row in range(4):
        expected = reference_distribution(logits[row], 0.7, (3, 8), top_k, top_p)
        np.testing.assert_allclose(jax.nn.softmax(processed[row]), expected, atol=1e-6)


def test_draws_follow_the_truncated_distribution():
    logits = np.random.default_rng(1).normal(size=(1, VOCAB)).astype(np.float32) * 2
    sampling = Sampling(max_new_tokens=1, temperature=1.3, top_k=9, top_p=0.8, suppress_ids=(4,))
    count = 40_000
    keys = jax.random.split(jax.random.key(0), count)
    tokens, log_probs = jax.jit(sample_tokens, static_argnums=2)(
        jnp.tile(jnp.asarray(logits), (count, 1)), keys, sampling
    )
    expected = reference_distribution(logits[0], 1.3, (4,), 9, 0.8)
    shares = np.bincount(np.asarray(tokens), minlength=VOCAB) / count
    assert np.abs(shares - expected).max() < 0.01
    assert set(np.flatnonzero(shares)) == set(np.flatnonzero(expected))
    # What is reported belongs to the distribution before truncation.
    whole = reference_distribution(logits[0], 1.3, (4,), 0, 1.0)
    np.testing.assert_allclose(log_probs, np.log(whole[np.asarray(tokens)]), atol=1e-5)


def test_hf_warpers_give_the_same_distribution():
    torch = pytest.importorskip("torch")
    from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(2).normal(size=(6, VOCAB)).astype(np.float32) * 2
    expected = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(10)(None, torch.from_numpy(logits))).softmax(-1)
    np.testing.assert_allclose(jax.nn.softmax(truncate_logits(jnp.asarray(logits), 10, 0.8)), expected, atol=1e-6)


def test_greedy_takes_the_likeliest_allowed_token_and_reports_temperature_one():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(5, VOCAB)), jnp.float32)
    best = int(jnp.argmax(logits[0]))
    keys = jax.random.split(jax.random.key(0), 5)
    tokens, log_probs = sample_tokens(logits, keys, Sampling(max_new_tokens=1, temperature=0.0, suppress_ids=(best,)))
    allowed = np.asarray(logits).copy()
    allowed[:, best] = -1e9
    np.testing.assert_array_equal(tokens, allowed.argmax(-1))
    np.testing.assert_allclose(log_probs, np.log(softmax(allowed).max(-1)), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_one_damaged_logit_makes_the_log_prob_of_any_token_nan(temperature, damage):
    logits = np.random.default_rng(4).normal(size=(4, VOCAB)).astype(np.float32)
    logits[1, 3], logits[2, 5], logits[3, 7] = damage, damage, -np.inf  # 5 is suppressed; -inf is a probability of 0
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_k=3, suppress_ids=(5,))
    _, log_probs = sample_tokens(jnp.asarray(logits), jax.random.split(jax.random.key(0), 4), sampling)
    np.testing.assert_array_equal(np.isfinite(log_probs), [True, False, True, True])


def test_suppressed_tokens():
    assert suppress_ids(32000, 32001, (2,)) == (32000, 32001)
    assert suppress_ids(32000, 2, (2, 7)) == (32000,)
    assert suppress_ids(32000, None, (2,)) == (32000,)
    # A placeholder beyond the head's rows, and a temperature that would overflow the floor.
    processed = process_logits(jnp.ones((1, 4)), 0.1, (2, 128256))
    assert np.isfinite(processed).all()
    np.testing.assert_allclose(jax.nn.softmax(processed), [[1 / 3, 1 / 3, 0, 1 / 3]], atol=1e-7)


@pytest.mark.parametrize(
    "field, value",
    [("max_new_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0)],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(UserError, match=field):
        Sampling(**{"max_new_tokens": 4, field: value})


class Head(VisionLanguageModel):
    """A language-model head and nothing else."""

    num_exits = default_exit = vocab_size = hidden_size = image_token_index = 1

    def __init__(self, kernel):
        self.kernel = kernel

    def logits(self, hidden, head=None):
        return hidden @ head

    def head_for(self, hidden):
        return self.kernel


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
def test_chunked_log_probs_and_gradients_equal_the_whole_matrix(chunk):
    generator = np.random.default_rng(4)
    hidden = jnp.asarray(generator.normal(size=(2, 10, 8)), jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(8, VOCAB)), jnp.float32)
    targets = jnp.asarray(generator.integers(5, VOCAB, (2, 10)))
    weights = jnp.asarray(generator.normal(size=(2, 10)), jnp.float32)

    def whole(hidden, kernel):
        log_probs = jax.nn.log_softmax(process_logits(hidden @ kernel, 0.8, (1, 4)))
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        return jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0], entropy

    def chunked(hidden, kernel):
        return token_log_probs(Head(kernel), hidden, targets, temperature=0.8, suppress_ids=(1, 4), chunk=chunk)

    for got, expected in zip(chunked(hidden, kernel), whole(hidden, kernel), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)

    def total(function):
        return lambda hidden, kernel: sum(jnp.sum(weights * part) for part in function(hidden, kernel))

    got = jax.grad(total(chunked), (0, 1))(hidden, kernel)
    for a, b in zip(got, jax.grad(total(whole), (0, 1))(hidden, kernel), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_whole_logits_matrix_is_never_formed():
    batch, length, vocab, chunk = 2, 64, 97, 8
    hidden, targets = jnp.zeros((batch, length, 4)), jnp.zeros((batch, length), jnp.int32)

    def loss(kernel):
        return token_log_probs(Head(kernel), hidden, targets, temperature=1.0, suppress_ids=(), chunk=chunk)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((4, vocab))).as_text()
    assert f"{batch}x{chunk}x{vocab}xf32" in compiled
    assert f"{length // chunk}x{batch}x{chunk}x{vocab}x" not in compiled
    assert f"{batch}x{length}x{vocab}x" not in compiled
