"""What rewards a response during training, by the kind of its row (`config.reward.by_kind`)."""

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
    """Mean raw scores of each kind's rows: of all as `objective/scores/KIND`, of exit L's as `exit/L/scores/KIND`.

    Kinds are never averaged with each other: a reward model's scores and matches of 0 or 1 have no common mean.

    Args:
      examples: the rows, one kind each.
      scores: float32 [B]; NaN where a row could not be scored, which is left out.
      answered: bool [B], rows that have a response and something that rewards it.
      exits: int [B], the exit that each row was drawn at.
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
    """The kind of each row as its index in `config.names.KINDS`, int32 [B]."""
    return np.array([KINDS.index(example.kind) for example in examples], np.int32)


def not_refused(examples: Sequence[Example], texts: Sequence[str]) -> np.ndarray:
    """float32 [B]: 1 where a forbidden row's response does not refuse, 0 where it does, NaN for rows of other kinds."""
    kinds = np.array([example.kind for example in examples])
    return np.where(kinds == "forbidden", [not refused(text) for text in texts], np.nan).astype(np.float32)


def keyword_asr(failures: np.ndarray) -> dict[str, float]:
    """The metric of `not_refused`, over the rows where it is known; empty where there are none."""
    if not np.isfinite(failures).any():
        return {}
    return {"objective/asr_refusal_keywords": float(np.nanmean(failures, dtype=np.float64))}


class RewardByKind:
    """Scores the responses of a mixed batch; the reward model sees only the rows that it is to grade."""

    def __init__(self, by_kind: Mapping[str, str], reward_model: Scorer | None):
        """`by_kind`: kind -> "reward_model", "exact_match" or "none"; a `reward_model` is needed if a kind names it."""
        self._by_kind = dict(by_kind)
        self._reward_model = reward_model

    def lowered(self, tokens: int) -> Iterator[tuple[str, Any]]:
        """The reward model's programs for pairs of up to `tokens` tokens, by name, ready to be compiled."""
        programs = getattr(self._reward_model, "lowered", lambda _: ())
        return ((f"reward model at {length}", program) for length, program in programs(tokens))

    def rewarded(self, examples: Sequence[Example]) -> np.ndarray:
        """Which rows something rewards, bool [B]: all but those of a kind with the rule "none"."""
        return np.array([self._by_kind[example.kind] != "none" for example in examples], bool)

    def __call__(self, examples: Sequence[Example], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Scores one response per row.

        Returns:
          scores float32 [B] (0 where nothing rewards the row, NaN where its scorer failed or it has no answer), and
          learned bool [B], true where the score is the reward model's.
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
