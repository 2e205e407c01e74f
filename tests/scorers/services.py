"""Scorers of a line or two, for the tests of what stands around scorers."""

import numpy as np

from icet_jax.scorers.base import Scores


class Lengths:
    """A "reward model": the number of characters of prompt and response; an empty response is an error."""

    metric = "tr"

    def __init__(self, name="lengths", fingerprint="1", factor=1.0):
        self.name, self.fingerprint, self.factor = name, fingerprint, factor
        self.asked = []

    def __call__(self, prompts, responses):
        pairs = list(zip(prompts, responses, strict=True))
        self.asked += pairs
        values = [self.factor * (len(p) + len(r)) if r else np.nan for p, r in pairs]
        return {self.name: Scores(np.array(values, np.float32), [None] * len(pairs))}
