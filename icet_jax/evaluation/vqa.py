"""VQA-v2's official accuracy: agreement with ten annotators, as the public evaluator of VQA v2.0 computes it.

Each annotator in turn is left out, and the response scores min(1, k / 3), where k of the other annotators gave the same
answer. The accuracy is the mean of these scores. The evaluator normalises response and answers only if the annotators'
raw answers differ: if all ten wrote "yes", the responses "Yes" and "yes." score 0. Published results are therefore
usually computed from responses that were normalised before (`normalised_accuracy`, a metric of its own).
"""

import re
from collections.abc import Sequence

_FULL_CREDIT = 3  # number of agreeing annotators that gives a score of 1
_ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # the evaluator does not remove apostrophes and colons
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # full stops removed at most: the evaluator passes a flag with this value as `count` of re.sub


def _misspelt_contractions() -> dict[str, str]:
    """Returns {contraction with one apostrophe missing: correct contraction}.

    It includes one wrong entry, because the evaluator has it.
    """
    contractions = {"somebody'd": "somebodyd"}
    for word in _CONTRACTIONS.split():
        contractions |= {word[:index] + word[index + 1 :]: word for index, char in enumerate(word) if char == "'"}
    return contractions


_CORRECTED = _misspelt_contractions()


def normalise(text: str) -> str:
    """Returns the text as the evaluator compares it.

    The result is in lower case, with single spaces, digits for number words and without articles. A punctuation mark is
    removed everywhere if it stands next to a space somewhere in the text, or if the text contains a number such as
    1,000; otherwise it becomes a space. A full stop is removed unless a digit follows. Missing apostrophes of
    contractions are restored.
    """
    plain = text
    has_grouped_digits = _GROUPED_DIGITS.search(text) is not None
    for mark in _PUNCTUATION:
        is_next_to_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if has_grouped_digits or is_next_to_space else " ")
    plain = _PERIOD.sub("", plain, count=_MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(_CORRECTED.get(word, word) for word in words if word not in _ARTICLES)


def official_accuracy(response: str, answers: Sequence[str]) -> float:
    """Returns the evaluator's accuracy of one response, from 0 to 1.

    Args:
      response: response of the model.
      answers: answer of each annotator, at least one (VQA-v2 has ten).
    """
    response, answers = _as_one_line(response), [_as_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        response, answers = normalise(response), [normalise(answer) for answer in answers]
    return _agreement(response, answers)


def normalised_accuracy(response: str, answers: Sequence[str]) -> float:
    """Returns `official_accuracy` of the normalised response, as most published results report it."""
    return official_accuracy(normalise(_as_one_line(response)), answers)


def scores(response: str, answers: Sequence[str], answer_type: str | None) -> dict[str, float]:
    """Returns the scores of one response as {name: value}: `vqa/official`, `vqa/official_TYPE`, `vqa/normalised`.

    Args:
      response: response of the model.
      answers: answer of each annotator.
      answer_type: the data set's TYPE of the answer: "yes/no", "number", "other"; None for no `vqa/official_TYPE`.
    """
    accuracy = official_accuracy(response, answers)
    result = {"vqa/official": accuracy, "vqa/normalised": normalised_accuracy(response, answers)}
    if answer_type:
        result["vqa/official_" + re.sub(r"[^a-z0-9]+", "_", answer_type.lower()).strip("_")] = accuracy
    return result


def _as_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _agreement(response: str, answers: Sequence[str]) -> float:
    """Returns the mean over annotators of min(1, k / 3), where k of the other annotators gave the response."""
    agrees = [answer == response for answer in answers]
    agreeing_others = [sum(agrees) - annotator_agrees for annotator_agrees in agrees]
    return sum(min(1.0, count / _FULL_CREDIT) for count in agreeing_others) / len(answers)
