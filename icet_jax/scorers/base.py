"""The interface of all scorers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True, eq=False)
class Scores:
    """Holds one scorer's numbers for B responses.

    Attributes:
      values: float32 [B]. NaN is an error (no verdict), which is counted and never replaced by another scorer's number.
      labels: the verdict in words, [B]; None if the scorer has no labels or failed.
    """

    values: np.ndarray
    labels: list[str | None]

    def __post_init__(self) -> None:
        if self.values.dtype != np.float32 or self.values.shape != (len(self.labels),):
            raise ValueError(f"{len(self.labels)} labels need as many float32 values, not {self.values!r}")


@runtime_checkable
class Scorer(Protocol):
    """Scores responses to raw prompts (without a chat template).

    A scorer may also have these attributes. `label_shares`, {label: metric family}: the share of responses with that
    label is reported too, for example {"refused": "refusal", "degenerate": "degenerate"}. `families`, {result name:
    metric family}: the results that do not belong to the family `metric` ("p_unsafe", the probability of the verdict
    "unsafe"). `fingerprint`: a text that identifies what its scores depend on besides its name (weights, template,
    dtype); sweeps judge again if it has changed, and without it scores are not cached. `reads_prompts = False`: a score
    depends only on the response. `remote = True`: another machine computes the scores.

    Attributes:
      name: name of the exact model, in the form of metric names (see `metric_name`).
      metric: meaning of the number: "asr" (1 = the attack succeeded, 0 = it did not), "tr" (reward), "ts" (toxicity,
        0..1).
    """

    name: str
    metric: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Scores B pairs and returns the scores by scorer name (a network with several heads has several names)."""
        ...


def metric_name(path_or_id: str) -> str:
    """Returns a model's name as part of a metric's name: the last part of its path or hub id, lower case, `_` for
    punctuation."""
    last = str(path_or_id).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_")
