"""Whether a response is the expected answer."""

import re
import string
from collections.abc import Sequence

import numpy as np

from icet_jax.scorers.base import Scores

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")


def normalise(text: str) -> str:
    """Lower case without punctuation, articles or extra spaces; number words up to ten become digits.

    A text of nothing else ("A" as an answer) keeps what it has, so that it never equals an empty response.
    """
    words = _PUNCTUATION.sub(" ", text.lower().replace("'", "")).split()
    kept = [_NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words) or text.strip()


def exact_match(responses: Sequence[str], answers: Sequence[str | None]) -> Scores:
    """1 where the normalised response is the normalised answer, 0 where not, NaN where a row has no answer.

    This is not VQA-v2's official measure (which credits agreement with ten annotators): metrics made of it are named
    `accuracy/vqa_exact`, `accuracy/benign_exact`.
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
