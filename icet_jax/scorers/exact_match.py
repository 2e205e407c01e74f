"""Tests whether a response equals the expected answer after normalisation."""

import re
import string
from collections.abc import Sequence

import numpy as np

from icet_jax.scorers.base import Scores

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def normalise(text: str) -> str:
    """Returns the text in lower case without punctuation, articles or extra spaces, with digits for "zero" to "ten".

    A text of only articles (the answer "A") keeps them, and a text of only punctuation is not changed, so that no text
    becomes empty unless it was empty.
    """
    words = _PUNCTUATION.sub(" ", text.lower().replace("'", "")).split()
    remaining = [_DIGITS.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(remaining or words) or text.strip()


def exact_match(responses: Sequence[str], answers: Sequence[str | None]) -> Scores:
    """Returns scores of B responses: 1 if the normalised response equals the normalised answer, 0 if not.

    This is not VQA-v2's official accuracy, which counts how many of ten annotators gave the same answer. The metrics
    based on these scores are `accuracy/vqa_exact` and `accuracy/benign_exact`.

    Args:
      responses: responses of the model, [B].
      answers: the expected answers, [B]; a row whose answer is None has the score NaN.
    """
    values = np.array(
        [
            np.nan if answer is None else normalise(response) == normalise(answer)
            for response, answer in zip(responses, answers, strict=True)
        ],
        dtype=np.float32,
    )
    labels = [None if np.isnan(value) else ("right" if value else "wrong") for value in values]
    return Scores(values, labels)
