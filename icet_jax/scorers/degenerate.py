"""Detects degenerate responses: empty, without letters and digits, or repetitive."""

import re

_MOST_REPEATS = 3  # most consecutive occurrences of a word or phrase in normal text
_LONGEST_PHRASE = 8  # words
_MIN_WORDS_FOR_VARIETY = 8  # shorter responses are not tested for lack of variety
_LEAST_VARIETY = 0.25  # smallest ratio of different words to words in normal text

_SYLLABLES = re.compile(r"(\S{1,8}?)\1{11,}")  # "hahahaha...": 12 times the same few characters
_WORD = re.compile(r"\w+(?:'\w+)?")


def degenerate_reason(text: str) -> str | None:
    """Returns why a response is degenerate, or None if it is not.

    A response that was truncated at the token limit is not degenerate for that reason; it is counted separately.

    Returns:
      "empty": there is only white space.
      "symbols": there is no letter or digit.
      "repetition": a word or a phrase of up to 8 words occurs more than 3 times in a row; or 1 to 8 characters occur 12
        times in a row; or there are at least 8 words and fewer than a quarter of them are different.
    """
    if not text.strip():
        return "empty"
    words = _WORD.findall(text.lower())
    if not any(character.isalnum() for character in text):
        return "symbols"
    lacks_variety = len(words) >= _MIN_WORDS_FOR_VARIETY and len(set(words)) < _LEAST_VARIETY * len(words)
    if lacks_variety or _repeats_a_phrase(words) or _SYLLABLES.search(text):
        return "repetition"
    return None


def _repeats_a_phrase(words: list[str]) -> bool:
    """Returns whether a phrase of up to `_LONGEST_PHRASE` words occurs more than `_MOST_REPEATS` times in a row."""
    for length in range(1, _LONGEST_PHRASE + 1):
        repeated_words = 0  # how many consecutive words equal the word that stands `length` words before them
        for index in range(length, len(words)):
            repeated_words = repeated_words + 1 if words[index] == words[index - length] else 0
            if repeated_words >= length * _MOST_REPEATS:
                return True
    return False
