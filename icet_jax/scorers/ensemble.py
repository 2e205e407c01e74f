"""Combines several reward models into one by the weighted mean of their scores."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from icet_jax.errors import UserError
from icet_jax.scorers.base import Scorer, Scores
from icet_jax.scorers.source import Entry


class Ensemble:
    """Computes the weighted mean of reward models (metric "tr"); a row that any of them cannot score is an error.

    Weights are divided by their sum. The members' scores are not rescaled.

    Attributes:
      name: see `Scorer`.
      fingerprint: hash of the members; None if one of them has no fingerprint.
      members: the scorers with their share of the mean.
    """

    metric = "tr"

    def __init__(self, name: str, members: Sequence[tuple[Scorer, Any]]) -> None:
        """Checks `members`, at least one (reward model, weight above 0), with different names.

        Raises:
          UserError: there are no members, one is not a reward model, a weight is not a number above 0, or names repeat.
        """
        if not members:
            raise UserError(f"ensemble {name}: has no members; name at least one reward model")
        for member, weight in members:
            if member.metric != self.metric:
                raise UserError(f"ensemble {name}: {member.name} is a judge of {member.metric}, not a reward model")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise UserError(f"ensemble {name}: the weight of {member.name} is {weight!r}, but must be above 0")
        names = [name, *(member.name for member, _ in members)]
        if len(set(names)) < len(names):
            repeated = next(one for one in names if names.count(one) > 1)
            raise UserError(f"ensemble {name}: {repeated} is named twice; every score needs a name of its own")
        total = math.fsum(weight for _, weight in members)
        self.name = name
        self.members = [(member, weight / total) for member, weight in members]
        self.fingerprint = self._fingerprint()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Scores B pairs: the mean under the ensemble's name, then every member's own scores under their names."""
        mean, member_scores = np.zeros(len(prompts), np.float64), {}
        for member, share in self.members:
            scores = member(prompts, responses)[member.name]
            member_scores[member.name] = scores
            mean += share * scores.values.astype(np.float64)
        return {self.name: Scores(mean.astype(np.float32), [None] * len(prompts)), **member_scores}

    def lowered(self, tokens: int | None = None) -> Iterator[tuple[str, Any]]:
        """Yields the lowered programs of the members that have any, for pairs of up to `tokens` tokens."""
        for member, _ in self.members:
            if lowered := getattr(member, "lowered", None):
                yield from lowered(tokens)

    def _fingerprint(self) -> str | None:
        marks = [(member.name, getattr(member, "fingerprint", None), share) for member, share in self.members]
        if not all(mark for _, mark, _ in marks):
            return None
        return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]


def make_scorer(entry: Entry, *, members: Mapping[str, float]) -> Ensemble:
    """Returns the weighted mean of other scorers, under the name of its entry.

    Args:
      entry: of `config.scorers`.
      members: {name of a scorer: weight}.
    """
    return Ensemble(entry.name, [(entry.resolve(member), weight) for member, weight in members.items()])
