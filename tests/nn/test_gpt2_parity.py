"""The GPT-2 reward model agrees with transformers, and padding does not change a score."""

import jax.numpy as jnp
import numpy as np
import pytest

from icet_jax.scorers.networks import load_scorer_network
from tests import tiny

torch = pytest.importorskip("torch")

CASES = {
    "tiny": {},
    "prime widths": {"n_embd": 23, "n_head": 1, "n_inner": 41, "vocab_size": 263},
    "deeper": {"n_embd": 96, "n_head": 4, "n_layer": 12},
}


def batch(lengths, pad, seed=0):
    """Random rows of `lengths` real tokens, padded with the eos id on side `pad`."""
    generator = np.random.default_rng(seed)
    width = max(lengths)
    ids = np.full((len(lengths), width), tiny.GPT2_EOS)
    mask = np.zeros((len(lengths), width), bool)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if pad == "left" else slice(0, length)
        ids[row, where], mask[row, where] = generator.integers(0, 256, length), True
    return ids, mask


def ours(checkpoint, ids, mask):
    return np.asarray(checkpoint.model(jnp.asarray(ids, jnp.int32), jnp.asarray(mask)))


def theirs(model, ids, mask):
    with torch.no_grad():
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask).long()).logits[:, 0].numpy()


@pytest.mark.parametrize("case", CASES)
def test_scores_agree_with_right_padding(tmp_path, case):
    model = tiny.reward_model(seed=1, **CASES[case])
    checkpoint = load_scorer_network(tiny.save_reward_model(tmp_path, model))
    ids, mask = batch([1, 9, 31, 64], "right")
    expected = theirs(model, ids, mask)
    assert np.abs(ours(checkpoint, ids, mask) - expected).max() <= 1e-5 * max(1.0, expected.std())


def test_padding_does_not_change_a_score(tmp_path):
    model = tiny.reward_model(seed=2)
    checkpoint = load_scorer_network(tiny.save_reward_model(tmp_path, model))
    lengths = [5, 17, 40]
    left, right = (ours(checkpoint, *batch(lengths, pad)) for pad in ("left", "right"))
    ids, _ = batch(lengths, "right")
    alone = [ours(checkpoint, ids[row : row + 1, :n], np.ones((1, n), bool))[0] for row, n in enumerate(lengths)]
    np.testing.assert_allclose(right, alone, atol=2e-6)
    np.testing.assert_allclose(left, alone, atol=2e-6)


def test_texts_longer_than_the_positions_are_refused(tmp_path):
    checkpoint = load_scorer_network(tiny.save_reward_model(tmp_path))
    with pytest.raises(ValueError, match="64 positions"):
        ours(checkpoint, np.zeros((1, 65), int), np.ones((1, 65), bool))
