"""Each kind of row is rewarded by what the config names, and by nothing else."""

from types import SimpleNamespace

import numpy as np

from icet_jax.algorithms.lppo import Lppo
from icet_jax.algorithms.reward_by_kind import RewardByKind
from icet_jax.algorithms.state import Controls, TrainState
from icet_jax.algorithms.utilisation import Stopwatch
from icet_jax.config.names import KINDS
from icet_jax.data.records import Example
from icet_jax.evaluation.batching import PromptBatch
from icet_jax.scorers.base import Scores
from tests.algorithms import toy


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
EXITS = np.array([3, 3, 3, 7, 7], np.int32)


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


def test_a_row_without_a_reward_is_told_apart_from_a_row_that_scored_nothing():
    reward = RewardByKind({"forbidden": "reward_model", "vqa": "exact_match", "benign": "none"}, Lengths())
    np.testing.assert_array_equal(reward.rewarded(ROWS), [True, True, False, True, True])


def iteration(reward, texts, monkeypatch):
    """(what the second phase was given, the metrics) of an iteration of L-PPO whose phases do nothing."""
    given = {}

    def prepare(params, state, rollout, scores, learned, longest, rewarded, failures, kinds):
        given.update(scores=scores, learned=learned, longest=longest, rewarded=rewarded, kinds=kinds)
        return state, None, {}

    lppo = Lppo.__new__(Lppo)
    lppo._reward, lppo._watch, lppo._run_key, lppo.peak = reward, Stopwatch(), None, None
    lppo._vlm = SimpleNamespace(params=None, processor=SimpleNamespace(decode=lambda tokens, mask: texts))
    lppo._phases = SimpleNamespace(prepare=prepare, update=lambda params, state, *_: (state, {}))
    lppo.settings, lppo.group_size = toy.SETTINGS, 1
    lppo._counter = SimpleNamespace(count=lambda *_, **__: None, evaluated=lambda _: 0)
    mask = np.array([[bool(text)] for text in texts])
    rollout = SimpleNamespace(tokens=mask.astype(np.int32), mask=mask, exits=EXITS)
    monkeypatch.setattr("icet_jax.algorithms.rewarded.speeds", lambda *_: {})
    state = TrainState(trainable={}, opt_state=None, controls=Controls(None, None), iteration=0, updates=0)
    return given, lppo.finish(state, PromptBatch(ROWS, mask, mask, None), rollout)[1]


def test_an_iteration_reports_the_scores_of_each_kind_that_is_rewarded(monkeypatch):
    """A reward model's scores and matches of 0 or 1 have no common mean."""
    reward = RewardByKind({"forbidden": "reward_model", "vqa": "exact_match", "benign": "none"}, Lengths())
    _, read = iteration(reward, ["abcdef", "Red.", "no", "ab", "red"], monkeypatch)  # row 5 has no answer to match
    means = {name: value for name, value in read().items() if name.startswith("objective/scores")}
    assert means == {"objective/scores/forbidden": 4.0, "objective/scores/vqa": 1.0}
    _, read = iteration(reward, ["abcdef", "", "no", "", ""], monkeypatch)  # rows without a response have no score
    means = {name: value for name, value in read().items() if name.startswith("objective/scores")}
    assert means == {"objective/scores/forbidden": 6.0}


def test_the_scores_of_an_exit_are_told_apart_by_kind(monkeypatch):
    """At exit 3 a reward model's 6.0 and a match of 1 have the mean 3.5, which says nothing."""
    reward = RewardByKind({"forbidden": "reward_model", "vqa": "exact_match", "benign": "none"}, Lengths())
    _, read = iteration(reward, ["abcdef", "Red.", "no", "ab", "red"], monkeypatch)
    means = {name: value for name, value in read().items() if name.startswith("exit/")}
    assert means == {"exit/3/scores/forbidden": 6.0, "exit/3/scores/vqa": 1.0, "exit/7/scores/forbidden": 2.0}


def test_an_iteration_says_which_rows_are_rewarded(monkeypatch):
    reward = RewardByKind({"forbidden": "reward_model", "vqa": "exact_match", "benign": "none"}, Lengths())
    given, _ = iteration(reward, ["abc", "Red.", "no", "", "red"], monkeypatch)
    assert given["rewarded"].tolist() == [True, True, False, True, True] and given["longest"] == 1
    assert [KINDS[number] for number in given["kinds"]] == [row.kind for row in ROWS]
