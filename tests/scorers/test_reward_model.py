"""The reward-model scorer: transformers' tokens, one number per pair whatever its neighbours, training that learns."""

import jax
import numpy as np
import pytest
from flax import nnx

from icet_jax.errors import UserError
from icet_jax.nn.gpt2 import GPT2Config, GPT2RewardModel
from icet_jax.parallel.compilations import CompilationCounter
from icet_jax.scorers.pairs import HH_TEMPLATE, GPT2PairTokenizer, longest_first
from icet_jax.scorers.reward_model import RewardModel
from icet_jax.training.reward_model import RewardTraining, preference_loss, train_reward_model
from tests import tiny

CONFIG = GPT2Config(vocab_size=tiny.GPT2_VOCAB, n_positions=64, n_embd=24, n_layer=2, n_head=3, n_inner=96)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.reward_tokenizer()


def model(seed=0):
    network = GPT2RewardModel(CONFIG, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(network)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, params))


@pytest.mark.parametrize("sizes", [(1, 2), (30, 30), (10, 50), (50, 10), (25, 60), (0, 90), (33, 32), (70, 71)])
def test_pairs_are_tokenised_as_transformers_does(tokenizer, sizes):
    first, second = "p" * sizes[0], "r" * sizes[1]
    expected = tokenizer(first, second, truncation=True, max_length=64)["input_ids"]
    assert GPT2PairTokenizer(tokenizer, template="{prompt}", max_length=64)([first], [second]) == [expected]


@pytest.mark.parametrize("limit", [20, 21])
def test_longest_first_fits(limit):
    for first in range(45):
        for second in range(45):
            kept = longest_first(first, second, limit)
            assert sum(kept) == min(first + second, limit)
            assert kept[0] <= first and kept[1] <= second


def test_template_holds_the_raw_prompt_once(tokenizer):
    pairs = GPT2PairTokenizer(tokenizer, template=HH_TEMPLATE, max_length=64)
    (row,) = pairs(["a {b} c"], [" ok"])
    assert tokenizer.decode(row) == "\n\nHuman: a {b} c \n\nAssistant: ok"
    with pytest.raises(UserError, match="template"):
        GPT2PairTokenizer(tokenizer, template="no place", max_length=64)


def test_trailing_eos_is_dropped(tokenizer):
    pairs = GPT2PairTokenizer(tokenizer, template=HH_TEMPLATE, max_length=64)
    plain, ended = pairs(["p", "p"], ["fine", "fine<|endoftext|><|endoftext|>"])
    assert plain == ended


def test_a_score_does_not_depend_on_its_neighbours(tokenizer):
    scorer = RewardModel(model(), tokenizer, name="toy", template="{prompt}", batch_size=3)
    prompts = ["p" * n for n in (3, 30, 1, 12, 60, 5, 2)]
    responses = ["r" * n for n in (5, 2, 1, 40, 60, 9, 0)]
    together = scorer(prompts, responses)["toy"]
    assert together.values.dtype == np.float32 and together.labels == [None] * 7
    alone = [scorer([p], [r])["toy"].values[0] for p, r in zip(prompts, responses, strict=True)]
    np.testing.assert_allclose(together.values, alone, atol=1e-5)
    assert np.unique(together.values.round(4)).size == 7


def test_no_text_or_no_number_is_an_error(tokenizer):
    scorer = RewardModel(model(), tokenizer, name="toy", template="{prompt}")
    values = scorer(["", "x"], ["", ""])["toy"].values
    assert np.isnan(values[0]) and np.isfinite(values[1])
    broken = model()
    broken.score.kernel[...] = broken.score.kernel[...] * np.nan
    assert np.isnan(RewardModel(broken, tokenizer, name="toy")(["x"], ["y"])["toy"].values).all()
    assert RewardModel(model(), tokenizer, name="toy")([], [])["toy"].values.shape == (0,)


def test_once_its_programs_are_compiled_pairs_of_any_length_compile_nothing(tokenizer):
    scorer = RewardModel(model(), tokenizer, name="toy", template="{prompt}", batch_size=2)
    programs = [program.compile() for _, program in scorer.lowered()]
    with CompilationCounter() as counter:
        scorer(["p" * n for n in (1, 20, 40, 90)], ["r"] * 4)
    assert (len(programs), counter.count) == (2, 0)


def test_preference_loss():
    chosen, rejected = np.array([1.0, -2.0], np.float32), np.array([0.5, 3.0], np.float32)
    expected = np.mean(np.log1p(np.exp(-(chosen.astype(np.float64) - rejected))))
    loss = preference_loss(jax.numpy.asarray(chosen), jax.numpy.asarray(rejected))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def pairs(count, start=0):
    return [(f"say {i}", f"kind {i * 7 % 13}", f"rude {i * 5 % 11}") for i in range(start, start + count)]


def test_training_learns_and_is_deterministic(tokenizer):
    start = GPT2RewardModel(CONFIG, rngs=nnx.Rngs(0))
    before = np.asarray(start.wte[...]).copy()
    settings = RewardTraining(steps=25, batch_size=16, learning_rate=3e-3, warmup_steps=3)
    data = pairs(48), pairs(20, 100)
    runs = [train_reward_model(start, tokenizer, *data, settings, template="{prompt} ") for _ in range(2)]
    report = runs[0][1]
    assert report.losses[-1] < 0.3 < 0.6 < report.losses[0]
    assert report.held_out_accuracy == 1.0 and report.held_out_margin > 0.5 and report.held_out_pairs == 20
    np.testing.assert_array_equal(start.wte[...], before)
    for a, b in zip(*(jax.tree.leaves(nnx.split(trained)[1]) for trained, _ in runs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_stops_on_bad_input(tokenizer):
    settings = RewardTraining(steps=3, batch_size=4, learning_rate=float("inf"), warmup_steps=0)
    with pytest.raises(UserError, match="at step"):
        train_reward_model(model(), tokenizer, pairs(4), pairs(2), settings)
    with pytest.raises(UserError, match="at least one"):
        train_reward_model(model(), tokenizer, pairs(4), [], settings)
