"""Each kind of row is rewarded by what the config names, and by nothing else."""

import numpy as np

from icet_jax.data.records import Example
from icet_jax.judges.base import Scores
from icet_jax.runs.reward import RewardByKind


class Lengths:
    """Rewards a response by its length, and remembers what it was asked."""

    name, metric = "lengths", "tr"

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, responses):
        self.seen.append((list(prompts), list(responses)))
        return {self.name: Scores(np.array([len(r) or np.nan for r in responses], np.float32), [None] * len(responses))}


ROWS = [
    Example("a", "first", kind="forbidden"),
    Example("b", "second", kind="vqa", answer="red"),
    Example("c", "third", kind="benign", answer="yes"),
    Example("d", "fourth", kind="forbidden"),
    Example("e", "fifth", kind="vqa"),
]


def test_rows_are_rewarded_by_kind():
    model = Lengths()
    reward = RewardByKind({"forbidden": "reward_model", "vqa": "exact_match", "benign": "none"}, model)
    scores, learned = reward(ROWS, ["abc", "Red.", "no", "", "red"])
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [3, 1, 0, np.nan, np.nan])
    np.testing.assert_array_equal(learned, [True, False, False, True, False])
    assert model.seen == [(["first", "fourth"], ["abc", ""])]


def test_a_reward_model_is_not_asked_about_nothing():
    reward = RewardByKind({"vqa": "exact_match"}, None)
    scores, learned = reward(ROWS[1:2], ["blue"])
    assert scores.tolist() == [0.0] and not learned.any()
