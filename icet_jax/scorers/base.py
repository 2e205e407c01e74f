"""The interface of all scorers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True, eq=False)
class Scores:
    """Holds one scorer's scores of B responses.

    Attributes:
      values: the scores, float32 [B]. NaN means that the scorer gave no score; such rows are counted as errors.
      labels: the verdicts in words, one per response; None where the scorer has no labels or gave no score.
    """

    values: np.ndarray
    labels: list[str | None]

    def __post_init__(self) -> None:
        if self.values.dtype != np.float32 or self.values.shape != (len(self.labels),):
            raise ValueError(f"{len(self.labels)} labels need as many float32 values, not {self.values!r}")


@runtime_checkable
class Scorer(Protocol):
    """Scores responses to raw prompts (without a chat template).

    A scorer may also have these optional attributes:
      label_shares: {label: metric family}. The share of responses with that label is reported under the family, for
        example {"refused": "refusal", "degenerate": "degenerate"}.
      families: {result name: metric family} for results that do not belong to the family `metric`, for example
        "p_unsafe", the probability of the verdict "unsafe".
      fingerprint: text that changes whenever the scores may change (weights, template, dtype). A sweep then scores its
        answers again. Scores of a scorer without a fingerprint are not cached.
      reads_prompts: False if a score depends on the response alone.
      remote: True if another machine computes the scores.

    Attributes:
      name: name of the exact model, in the form of metric names (see `metric_name`).
      metric: what a score means: "asr" (1 = the attack succeeded, 0 = it did not), "tr" (reward), "ts" (toxicity,
        0..1).
    """

    name: str
    metric: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Returns the scores of B (prompt, response) pairs as {result name: scores}.

        Most scorers have one result, called `name`. A network with several heads has one result per head.
        """
        ...


def metric_name(path_or_id: str) -> str:
    """Returns a model's name as it appears in metric names, such as "llama_guard_3_8b".

    It is the last part of the model's path or hub id in lower case, with `_` in place of punctuation.
    """
    last = str(path_or_id).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_")
