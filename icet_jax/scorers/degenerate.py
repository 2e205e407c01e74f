"""Detects responses that are not normal text: empty, symbols only, or repetitive."""

import re

_MOST_REPEATS = 3  # most consecutive occurrences of a word or phrase in normal text
_LONGEST_PHRASE = 8  # words
_FEW_WORDS = 8  # shorter responses are not tested for lack of variety
_LEAST_VARIETY = 0.25  # different words / words

_SYLLABLES = re.compile(r"(\S{1,8}?)\1{11,}")  # "hahahaha...": 12 times the same few characters
_WORD = re.compile(r"\w+(?:'\w+)?")


def degenerate_reason(text: str) -> str | None:
    """Returns why a response is degenerate, or None.

    "empty": only white space. "symbols": no letter or digit. "repetition": a word or a phrase of up to 8 words occurs
    more than 3 times in a row, a few characters 12 times, or fewer than a quarter of at least 8 words are different.
    Truncation at the token limit is not degenerate by itself; it is counted separately.
    """
    if not text.strip():
        return "empty"
    words = _WORD.findall(text.lower())
    if not any(character.isalnum() for character in text):
        return "symbols"
    lacks_variety = len(words) >= _FEW_WORDS and len(set(words)) < _LEAST_VARIETY * len(words)
    if lacks_variety or _loops(words) or _SYLLABLES.search(text):
        return "repetition"
    return None


def _loops(words: list[str]) -> bool:
    """Returns whether some phrase occurs more than `_MOST_REPEATS` times in a row."""
    for length in range(1, _LONGEST_PHRASE + 1):
        run = 0  # how many words in a row equal the word `length` before them
        for index in range(length, len(words)):
            run = run + 1 if words[index] == words[index - length] else 0
            if run >= length * _MOST_REPEATS:
                return True
    return False
