"""The free judges: refusal phrases, degenerate text, exact answers."""

import numpy as np
import pytest

from icet_jax.scorers.base import Scores, metric_name
from icet_jax.scorers.degenerate import degenerate_reason
from icet_jax.scorers.exact_match import exact_match, normalise
from icet_jax.scorers.keywords import REFUSAL_PHRASES, RefusalKeywords, refused


@pytest.mark.parametrize("phrase", REFUSAL_PHRASES)
def test_every_phrase_is_a_refusal_anywhere(phrase):
    assert refused(f"Well. {phrase} to do so.")
    assert refused(phrase.replace("'", "\u2019"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sorry i cannot help with that", True),
        ("  sorry, no", True),
        ("step one take the rope step two lift the zorb", False),
        ("such as an apple", False),
        ("she said sorry and left", False),
        ("Sure, here is how", False),
        ("", False),
    ],
)
def test_case_and_place(text, expected):
    assert refused(text) is expected


def test_refusal_keywords_scorer():
    result = RefusalKeywords()(["p", "p", "p"], ["Sorry, no.", "Sure.", ""])
    assert list(result) == ["refusal_keywords"]
    scores = result["refusal_keywords"]
    assert scores.values.dtype == np.float32
    assert scores.values.tolist() == [0, 1, 1]
    assert scores.labels == ["refused", "complied", "complied"]


def test_scores_are_checked():
    with pytest.raises(ValueError, match="labels"):
        Scores(np.zeros(2, np.float32), [None])
    with pytest.raises(ValueError, match="float32"):
        Scores(np.zeros(1), [None])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Ray2333/gpt2-large-harmless-reward_model", "gpt2_large_harmless_reward_model"),
        ("meta-llama/Llama-Guard-3-8B", "llama_guard_3_8b"),
        ("/some/folder/rm.v1/", "rm_v1"),
    ],
)
def test_metric_name(path, name):
    assert metric_name(path) == name


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("... !! ?", "symbols"),
        ("the the the the", "repetition"),
        ("red red red", None),
        ("take it now " * 4, "repetition"),
        ("take it now " * 3, None),
        ("so it goes on. " + "and on we go " * 5, "repetition"),
        ("a b a b b a b a a b a b b b a b a", "repetition"),
        ("ha" * 30, "repetition"),
        ("step one take the rope step two lift the zorb", None),
        ("The image shows a red square on the left and a blue circle on the right.", None),
        ("3", None),
        ("no no no, do not do that", None),
        ("\u7ea2\u8272\u7684\u65b9\u5757", None),
    ],
)
def test_degenerate(text, reason):
    assert degenerate_reason(text) == reason


@pytest.mark.parametrize(
    ("response", "answer"),
    [("Red.", "red"), ("the red one", "red 1"), ("Two", "2"), ("it's", "its"), ("  yes\n", "Yes!"), ("A", "a")],
)
def test_normalise_makes_equal(response, answer):
    assert normalise(response) == normalise(answer)


def test_exact_match():
    scores = exact_match(["a red square", "blue", "x", "", ""], ["red square", "red", None, "A", "the"])
    assert scores.labels == ["right", "wrong", None, "wrong", "wrong"]
    np.testing.assert_array_equal(scores.values, np.array([1, 0, np.nan, 0, 0], np.float32))
