"""The DeBERTa reward model agrees with transformers, inside its buckets and far beyond them."""

import numpy as np
import pytest

from icet_jax.nn.deberta import DebertaConfig, DebertaRewardModel, relative_index
from icet_jax.scorers.networks import load_scorer_network
from tests import tiny_scorers
from tests.nn.scorers import alone, assert_full_size, ours, theirs

torch = pytest.importorskip("torch")

CASES = {
    "tiny": {},
    "prime widths": {"hidden_size": 23, "num_attention_heads": 1},
    "far limit": {"max_relative_positions": 30, "pos_att_type": "p2c|c2p"},
    "deeper": {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 12},
}
LARGE = DebertaConfig(128100, 1024, 24, 16, 4096, position_buckets=256, max_relative_positions=512)


def rows(lengths, **options):
    return tiny_scorers.rows(lengths, vocab=tiny_scorers.DEBERTA_VOCAB, **options)


def test_distances_fall_into_the_buckets_of_v3():
    index = relative_index(514, 256, 512)
    distances = [0, 1, 127, 128, 129, 131, 132, 140, 160, 200, 256, 300, 400, 500, 510, 511]
    buckets = [0, 1, 127, 128, 129, 131, 131, 137, 149, 169, 192, 207, 233, 254, 255, 255]
    assert [index[distance, 0] - 256 for distance in distances] == buckets
    assert [256 - index[0, distance] for distance in distances] == buckets
    assert (index[:512, 0] - 256).sum() == 87297
    assert index[512, 0] == 511 and index[0, 512] == 0


@pytest.mark.parametrize("case", CASES)
def test_rewards_agree(tmp_path, case):
    model = tiny_scorers.deberta(seed=1, **CASES[case])
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    ids, mask = rows([1, 9, 18, 37, 64])
    expected = theirs(model, ids, mask)[:, 0]
    assert expected.std() > 0.1
    assert np.abs(ours(checkpoint, ids, mask) - expected).max() <= 1e-5


def test_rewards_agree_beyond_the_positions_with_the_buckets_of_v3(tmp_path):
    model = tiny_scorers.deberta(seed=2, position_buckets=256, max_position_embeddings=512)
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model))
    ids, mask = rows([601, 301])
    assert np.abs(ours(checkpoint, ids, mask) - theirs(model, ids, mask)[:, 0]).max() <= 1e-5


def test_small_embeddings_show_a_wrong_epsilon(tmp_path):
    model = tiny_scorers.deberta(seed=3, scale=1e-3)
    ids, mask = rows([7, 18])
    expected = theirs(model, ids, mask)[:, 0]
    right = ours(load_scorer_network(tiny_scorers.save(tmp_path, model)), ids, mask)
    np.testing.assert_allclose(right, expected, atol=1e-5)
    wrong = load_scorer_network(tiny_scorers.save(tmp_path, model, config={"layer_norm_eps": 1e-5}))
    assert np.abs(ours(wrong, ids, mask) - expected).max() > 1e-3


def test_padding_does_not_change_a_reward(tmp_path):
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, tiny_scorers.deberta(seed=4)))
    ids, mask = rows([5, 17])
    expected = alone(checkpoint, ids, mask)
    for padded in ((ids, mask), (np.where(mask, ids, 7), mask), rows([5, 17], pad="left")):
        np.testing.assert_allclose(ours(checkpoint, *padded), expected, atol=2e-6)


def test_bfloat16_stays_near(tmp_path):
    model = tiny_scorers.deberta(seed=5)
    checkpoint = load_scorer_network(tiny_scorers.save(tmp_path, model), dtype="bfloat16")
    ids, mask = rows([12, 30])
    assert np.abs(ours(checkpoint, ids, mask) - theirs(model, ids, mask)[:, 0]).max() <= 0.1


def test_parameters_at_full_size_are_the_published_ones_and_have_rules():
    assert_full_size(DebertaRewardModel, LARGE, 435_062_785)
