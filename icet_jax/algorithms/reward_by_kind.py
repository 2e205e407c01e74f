"""Scores responses during training by the rule for the kind of their row (`config.reward.by_kind`)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from icet_jax.config.names import KINDS
from icet_jax.data.records import Example
from icet_jax.scorers.base import Scorer
from icet_jax.scorers.exact_match import exact_match
from icet_jax.scorers.keywords import refused


def scores_by_kind(
    examples: Sequence[Example], scores: np.ndarray, answered: np.ndarray, exits: np.ndarray
) -> dict[str, float]:
    """Returns the mean raw score of each kind's rows, over all exits and at each exit.

    Kinds are never averaged with each other, because the scales of their scores differ: a reward model's scores are
    unbounded, those of exact matches are 0 or 1.

    Args:
      examples: the rows.
      scores: float32 [B]; NaN for a row that could not be scored, which is left out.
      answered: bool [B], true for rows with a response whose kind has a reward.
      exits: int [B], exit of each row.

    Returns:
      {metric: mean score}, where metrics are `objective/scores/KIND` and, for exit L, `exit/L/scores/KIND`.
    """
    kinds = np.array([example.kind for example in examples])
    counted = answered & np.isfinite(scores)
    means = {}
    for kind in KINDS:
        rows = counted & (kinds == kind)
        if rows.any():
            means[f"objective/scores/{kind}"] = float(np.mean(scores[rows]))
        for layer in np.unique(exits[rows]):
            means[f"exit/{layer}/scores/{kind}"] = float(np.mean(scores[rows & (exits == layer)]))
    return means


def kind_numbers(examples: Sequence[Example]) -> np.ndarray:
    """Returns the kind of each row as its index in `config.names.KINDS`, int32 [B]."""
    return np.array([KINDS.index(example.kind) for example in examples], np.int32)


def not_refused(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """Returns float32 [B]: 1 for a forbidden row whose response does not refuse, 0 if it does, NaN for other kinds."""
    kinds = np.array([example.kind for example in examples])
    return np.where(kinds == "forbidden", [not refused(text) for text in texts], np.nan).astype(np.float32)


def keyword_asr(failures: np.ndarray) -> dict[str, float]:
    """Returns {metric: mean of the result of `not_refused` over forbidden rows}; empty if there are none."""
    if not np.isfinite(failures).any():
        return {}
    return {"objective/asr_refusal_keywords": float(np.nanmean(failures, dtype=np.float64))}


class RewardByKind:
    """Scores the responses of a batch; the reward model gets only the rows of kinds with the rule "reward_model"."""

    def __init__(self, by_kind: Mapping[str, str], reward_model: Scorer | None):
        """Stores the rules.

        Args:
          by_kind: {kind: "reward_model", "exact_match" or "none"}.
          reward_model: scorer for kinds with the rule "reward_model"; None if no kind has this rule.
        """
        self._by_kind = dict(by_kind)
        self._reward_model = reward_model

    def lowered(self, tokens: int) -> Iterator[tuple[str, Any]]:
        """Yields (name, program) of the reward model's programs for pairs of up to `tokens` tokens, to be compiled."""
        programs = getattr(self._reward_model, "lowered", lambda _: ())
        return ((f"reward model at {length}", program) for length, program in programs(tokens))

    def rewarded(self, examples: Sequence[Example]) -> np.ndarray:
        """Returns for each row whether its kind has a reward (any rule except "none"), bool [B]."""
        return np.array([self._by_kind[example.kind] != "none" for example in examples], bool)

    def __call__(self, examples: Sequence[Example], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Scores one response per row.

        Returns:
          (scores float32 [B], whether the reward model computed the score, bool [B]). A score is 0 for a row without a
          reward, and NaN if the scorer failed or the row has no expected answer.
        """
        rules = np.array([self._by_kind[example.kind] for example in examples])
        scores = np.zeros(len(examples), np.float32)
        learned, matched = rules == "reward_model", rules == "exact_match"
        if learned.any():
            assert self._reward_model is not None
            rows = np.flatnonzero(learned).tolist()
            graded = self._reward_model([examples[row].prompt for row in rows], [texts[row] for row in rows])
            scores[rows] = graded[self._reward_model.name].values
        if matched.any():
            rows = np.flatnonzero(matched).tolist()
            scores[rows] = exact_match([texts[row] for row in rows], [examples[row].answer for row in rows]).values
        return scores, learned
