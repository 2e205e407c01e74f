"""Combines several reward models into one by the weighted mean of their scores."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.stages import Lowered

from icet_jax.errors import UserError
from icet_jax.scorers.base import Scorer, Scores
from icet_jax.scorers.source import Entry


class Ensemble:
    """Computes the weighted mean of several reward models' scores (metric "tr").

    Weights are divided by their sum. The members' scores are not rescaled. The mean is NaN if any member gives NaN.

    Attributes:
      name: see `Scorer`.
      fingerprint: hash of the members' names, fingerprints and weights; None if one of them has no fingerprint.
      members: (reward model, its weight as a share of all weights).
    """

    metric = "tr"

    def __init__(self, name: str, members: Sequence[tuple[Scorer, Any]]) -> None:
        """Checks and stores the members.

        Args:
          name: name of the ensemble in metrics.
          members: (reward model, weight above 0), at least one; all names differ.

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
            repeated = next(candidate for candidate in names if names.count(candidate) > 1)
            raise UserError(f"ensemble {name}: {repeated} is named twice; every score needs a name of its own")
        total = math.fsum(weight for _, weight in members)
        self.name = name
        self.members = [(member, weight / total) for member, weight in members]
        self.fingerprint = self._fingerprint()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Returns the scores of B pairs: the mean under the ensemble's name, each member's scores under its name."""
        mean, member_scores = np.zeros(len(prompts), np.float64), {}
        for member, share in self.members:
            scores = member(prompts, responses)[member.name]
            member_scores[member.name] = scores
            mean += share * scores.values.astype(np.float64)
        return {self.name: Scores(mean.astype(np.float32), [None] * len(prompts)), **member_scores}

    def lowered(self, tokens: int | None = None) -> Iterator[tuple[str, Lowered]]:
        """Yields the programs of all members for pairs of up to `tokens` tokens, see `BatchedNetwork.lowered`."""
        for member, _ in self.members:
            if lowered := getattr(member, "lowered", None):
                yield from lowered(tokens)

    def _fingerprint(self) -> str | None:
        """Returns the hash of the members; None if one of them has no fingerprint."""
        facts = [(member.name, getattr(member, "fingerprint", None), share) for member, share in self.members]
        if not all(fingerprint for _, fingerprint, _ in facts):
            return None
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def make_scorer(entry: Entry, *, members: Mapping[str, float]) -> Ensemble:
    """Returns the ensemble that an entry of `config.scorers` describes; it has the name of the entry.

    Args:
      entry: the entry, which also loads the members by name.
      members: {name of a reward model: weight}.
    """
    return Ensemble(entry.name, [(entry.resolve(member), weight) for member, weight in members.items()])
