"""The weighted mean of rewards, and nothing but rewards."""

import math

import numpy as np
import pytest

from icet_jax.errors import UserError
from icet_jax.scorers.base import Scorer
from icet_jax.scorers.ensemble import Ensemble
from icet_jax.scorers.keywords import RefusalKeywords
from tests.scorers.services import Lengths


def test_the_weighted_mean_with_the_members_own_numbers():
    ensemble = Ensemble("both", [(Lengths("a"), 3), (Lengths("b", factor=-2.0), 1.0)])
    result = ensemble(["p", "p"], ["r", "rrr"])
    assert list(result) == ["both", "a", "b"] and isinstance(ensemble, Scorer) and ensemble.metric == "tr"
    np.testing.assert_allclose(result["both"].values, [(3 * 2 - 4) / 4, (3 * 4 - 8) / 4])
    assert result["a"].values.tolist() == [2, 4] and result["b"].values.tolist() == [-4, -8]
    assert result["both"].values.dtype == np.float32


def test_a_row_that_one_member_cannot_score_is_an_error():
    class Robust(Lengths):
        def __call__(self, prompts, responses):
            return super().__call__(prompts, [response or "nothing" for response in responses])

    result = Ensemble("both", [(Lengths("a"), 1e-9), (Robust("b"), 1)])(["p", "p"], ["", "r"])
    assert math.isnan(result["both"].values[0]) and result["both"].values[1] == 2
    assert result["b"].values.tolist() == [8, 2]


def test_the_fingerprint_is_of_members_and_weights():
    def mark(*members):
        return Ensemble("both", members).fingerprint

    a, b = Lengths("a"), Lengths("b")
    assert mark((a, 1), (b, 1)) == mark((Lengths("a"), 2.0), (Lengths("b"), 2))
    others = [((a, 1), (b, 2)), ((a, 1),), ((Lengths("a", "2"), 1), (b, 1)), ((Lengths("c"), 1), (b, 1))]
    assert mark((a, 1), (b, 1)) not in {mark(*members) for members in others}
    assert mark((a, 1), (Lengths("b", None), 1)) is None


def test_its_programs_are_those_of_the_members_that_have_any():
    class Compiled(Lengths):
        def lowered(self, tokens):
            yield str(tokens), self.name

    members = [(Compiled("a"), 1), (Lengths("b"), 1), (Compiled("c"), 1)]
    assert [*Ensemble("all", members).lowered(96)] == [("96", "a"), ("96", "c")]


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([], "no members"),
        ([(RefusalKeywords(), 1.0)], "refusal_keywords is a judge of asr"),
        ([(Lengths("a"), 0)], "must be above 0"),
        ([(Lengths("a"), -1.0)], "must be above 0"),
        ([(Lengths("a"), math.nan)], "must be above 0"),
        ([(Lengths("a"), math.inf)], "must be above 0"),
        ([(Lengths("a"), True)], "must be above 0"),
        ([(Lengths("a"), "1")], "must be above 0"),
        ([(Lengths("a"), 1), (Lengths("a", "2"), 1)], "a is named twice"),
        ([(Lengths("both"), 1)], "both is named twice"),
    ],
)
def test_what_is_no_ensemble_is_one_line(members, says):
    with pytest.raises(UserError, match=says):
        Ensemble("both", members)
