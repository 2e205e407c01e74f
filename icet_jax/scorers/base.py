"""What every scorer offers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np


@dataclass(frozen=True, eq=False)
class Scores:
    """One scorer's numbers for B responses.

    Attributes:
      values: float32 [B]. NaN is an error (no verdict): it is counted, and never replaced by another scorer's number.
      labels: the verdict in words, [B]; None where the scorer has none or failed.
    """

    values: np.ndarray
    labels: list[str | None]

    def __post_init__(self) -> None:
        if self.values.dtype != np.float32 or self.values.shape != (len(self.labels),):
            raise ValueError(f"{len(self.labels)} labels need as many float32 values, not {self.values!r}")


@runtime_checkable
class Scorer(Protocol):
    """Scores responses to raw prompts (without a chat template).

    Attributes:
      name: the scorer to its exact model, in metric-name form (see `metric_name`).
      metric: what the number is: "asr" (1 = the attack succeeded, 0 = it did not), "tr" (reward), "ts" (toxicity 0..1).

    A scorer may also have `label_shares`, {label: metric family}: the share of responses with that label is then
    reported too, for example {"refused": "refusal", "degenerate": "degenerate"}. `families`, {result name: metric
    family}, names the results that are not of family `metric` ("p_unsafe", the probability of the verdict "unsafe").
    `fingerprint` is a text of what its scores depend on beside its name (weights, template, dtype): sweeps judge again
    where it has changed, and without one its scores are not cached. `reads_prompts = False` says that a score depends
    on the response alone, `remote = True` that another machine computes it.
    """

    name: str
    metric: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> dict[str, Scores]:
        """Scores B pairs; keyed by scorer name (a network with several heads gives several)."""
        ...


def metric_name(path_or_id: str) -> str:
    """A model's name as part of a metric's: the last part of its path or hub id in lower case, `_` for punctuation."""
    last = str(path_or_id).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9]+", "_", last.lower()).strip("_")
