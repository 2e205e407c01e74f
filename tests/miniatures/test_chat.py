"""The stand-in for a chat endpoint that the smoke configs name."""

import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.runs import config_files
from icet_jax.runs.scorers import ScorerLoader

PROMPTS, RESPONSES = ["ask", "ask", "ask"], ["a", "ab", "abc"]


def smoke(**changes):
    changes = [(f"scorers.served.{name}", value) for name, value in changes.items()]
    return config_files.load("configs/llava15_lppo.py:smoke", changes)


def test_the_smoke_config_judges_by_a_served_model(tmp_path):
    config = smoke()
    assert "served" in config.sweep.scorers
    (judge,) = ScorerLoader(config, tmp_path).judges(["served"])
    scores = judge(PROMPTS, RESPONSES)["served_judge"]
    assert judge.metric == "asr" and set(scores.labels) == {"safe", "unsafe"}
    np.testing.assert_array_equal(scores.values, [label == "unsafe" for label in scores.labels])


def test_its_scores_are_kept_from_process_to_process(tmp_path):
    for folder, hits in (("first", 0), ("second", 3)):
        config = smoke()
        config.sweep.score_cache = str(tmp_path / "scores")
        (judge,) = ScorerLoader(config, tmp_path / folder).judges(["served"])  # a service of its own in each
        judge(PROMPTS, RESPONSES)
        assert (judge.hits, judge.misses) == (hits, 3 - hits)


def test_another_toy_endpoint_is_one_line(tmp_path):
    with pytest.raises(UserError, match="endpoint 'toy:talk': no such toy; there is toy:chat"):
        ScorerLoader(smoke(endpoint="toy:talk"), tmp_path)("served")
