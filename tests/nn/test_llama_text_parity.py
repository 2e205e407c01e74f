"""Llama, Mistral, Qwen2 and Qwen3 as language models and reward models agree with transformers, generation included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from icet_jax.generation.decode import generate
from icet_jax.generation.sampling import Sampling
from icet_jax.nn.layers import positions_from_mask
from icet_jax.nn.llama import LlamaConfig, RopeScaling, inverse_frequencies
from icet_jax.nn.llama_text import LlamaLM, LlamaRewardModel
from icet_jax.scorers.networks import load_scorer_network
from tests import tiny, tiny_scorers
from tests.nn.scorers import alone, assert_full_size, ours, theirs

torch = pytest.importorskip("torch")

CASES = {
    "grouped queries": {},
    "as many keys as queries": {"num_key_value_heads": 4},
    "llama3 rope": {"rope_parameters": tiny_scorers.LLAMA3_ROPE},
    "tied head": {"tie_word_embeddings": True},
    "deeper": {"hidden_size": 96, "head_dim": 24, "num_hidden_layers": 12},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"kind": "Mistral", "sliding_window": 40},  # beyond the longest row
    "qwen2": {"kind": "Qwen2"},
    "qwen3": {"kind": "Qwen3", "head_dim": 10},  # not hidden_size / num_attention_heads
    "qwen3, tied, biased": {"kind": "Qwen3", "head_dim": 10, "tie_word_embeddings": True, "attention_bias": True},
}
LLAMA3 = RopeScaling(8.0, 1.0, 4.0, 8192)
GUARD_1 = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
GUARD_3 = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=5e5, rope_scaling=LLAMA3)
HARMBENCH = LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128)
QWEN2_7B = LlamaConfig(152064, 3584, 18944, 28, 28, 4, 128, biased=("q_proj", "k_proj", "v_proj"))
QWEN3_8B = LlamaConfig(151936, 4096, 12288, 36, 32, 8, 128, rms_norm_eps=1e-6, rope_theta=1e6, qk_norm=True)


def rows(lengths, **options):
    return tiny_scorers.rows(lengths, pad_id=tiny.PAD, first=3, vocab=259, **options)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, ids, mask):
    model = nnx.merge(graphdef, params)
    return model.logits(model.decode(ids, positions_from_mask(mask), mask))


def our_logits(checkpoint, ids, mask):
    return np.asarray(_logits(checkpoint.graphdef, checkpoint.params, jnp.asarray(ids, jnp.int32), jnp.asarray(mask)))


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_at_real_tokens(tmp_path, case):
    model = tiny_scorers.llama_lm(seed=1, **CASES[case])
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    for pad in ("left", "right"):
        ids, mask = rows([1, 9, 33], pad=pad)
        expected = theirs(model, ids, mask)[mask]
        assert np.abs(our_logits(checkpoint, ids, mask)[mask] - expected).max() <= 1e-5 * max(1.0, expected.std())


def test_the_test_sees_llama3_rope(tmp_path):
    model = tiny_scorers.llama_lm(seed=1, rope_parameters=tiny_scorers.LLAMA3_ROPE)
    plain = tiny_scorers.save(tmp_path, model, config={"rope_scaling": None})
    ids, mask = rows([33])
    assert np.abs(our_logits(load_scorer_network(plain), ids, mask) - theirs(model, ids, mask)).max() > 0.1


def test_rotary_frequencies_of_llama_guard_3():
    frequencies = inverse_frequencies(GUARD_3)
    assert frequencies.sum() == pytest.approx(5.386058263, abs=2e-6)
    assert frequencies[[31, 32, 63]] == pytest.approx([8.5675146e-4, 5.24846022e-4, 3.06892588e-7], rel=1e-6)


@pytest.mark.parametrize("case", ["biases", "qwen3, tied, biased"])
def test_greedy_generation_is_that_of_transformers(tmp_path, case):
    model = tiny_scorers.llama_lm(seed=2, rope_parameters=tiny_scorers.LLAMA3_ROPE, **CASES[case])
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    lengths = [4, 11, 26]
    sampling = Sampling(max_new_tokens=12, temperature=0.0, eos_ids=(tiny.EOS,), pad_id=tiny.PAD)
    keys = jax.random.split(jax.random.key(0), len(lengths))
    ids, mask = rows(lengths, pad="left")
    with torch.no_grad():
        expected = model.generate(
            torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long(), do_sample=False,
            max_new_tokens=12, pad_token_id=tiny.PAD,
        )[:, ids.shape[1] :].numpy()  # fmt: skip
    run = jax.jit(lambda params, ids, mask: generate(
        nnx.merge(checkpoint.graphdef, params), ids, mask, None, keys, sampling
    ))  # fmt: skip
    for pad in ("left", "right"):
        ids, mask = rows(lengths, pad=pad)
        out = run(checkpoint.params, jnp.asarray(ids, jnp.int32), jnp.asarray(mask))
        np.testing.assert_array_equal(np.asarray(out.tokens)[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("case", ["llama3 rope", "deeper", "mistral", "qwen2", "qwen3"])
def test_rewards_agree(tmp_path, case):
    model = tiny_scorers.llama_reward(seed=3, **CASES[case])
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    for pad in ("left", "right"):
        ids, mask = rows([1, 9, 33, 20], pad=pad)
        assert np.abs(ours(checkpoint, ids, mask) - theirs(model, ids, mask)[:, 0]).max() <= 1e-5


@pytest.mark.parametrize("build", [tiny_scorers.llama_lm, tiny_scorers.llama_reward])
def test_small_embeddings_show_a_wrong_epsilon(tmp_path, build):
    model = build(seed=4, scale=1e-2)
    ids, mask = rows([18])
    run = our_logits if build is tiny_scorers.llama_lm else lambda *args: ours(*args)[:, None]
    expected = theirs(model, ids, mask)
    right = run(load_scorer_network(tiny_scorers.save(tmp_path, model)), ids, mask)
    np.testing.assert_allclose(right, expected, atol=1e-5)
    wrong = tiny_scorers.save(tmp_path, model, config={"rms_norm_eps": 1e-6})
    assert np.abs(run(load_scorer_network(wrong), ids, mask) - expected).max() > 1e-3


def test_padding_does_not_change_a_reward(tmp_path):
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, tiny_scorers.llama_reward(seed=5)))
    right = rows([5, 17])
    expected = alone(checkpoint, *right)
    np.testing.assert_allclose(ours(checkpoint, *right), expected, atol=2e-6)
    np.testing.assert_allclose(ours(checkpoint, *rows([5, 17], pad="left")), expected, atol=2e-6)


def test_bfloat16_stays_near(tmp_path):
    model = tiny_scorers.llama_reward(seed=6)
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model), dtype="bfloat16")
    ids, mask = rows([12, 30])
    assert np.abs(ours(checkpoint, ids, mask) - theirs(model, ids, mask)[:, 0]).max() <= 0.1


@pytest.mark.parametrize(
    ("module", "config", "published"),
    [
        (LlamaLM, GUARD_1, 6_738_415_616),
        (LlamaLM, GUARD_3, 8_030_261_248),
        (LlamaLM, HARMBENCH, 13_015_864_320),
        (LlamaLM, QWEN2_7B, 7_615_616_512),
        (LlamaLM, QWEN3_8B, 8_190_735_360),
        (LlamaRewardModel, GUARD_3, 7_504_928_768),
    ],
    ids=["guard-1", "guard-3", "harmbench", "qwen2-7b", "qwen3-8b", "rm-8b"],
)
def test_parameters_at_full_size_are_the_published_ones_and_have_rules(module, config, published):
    assert_full_size(module, config, published)
