"""VQA-v2's official accuracy: agreement with ten annotators, as the public evaluator of VQA v2.0 computes it.

Each annotator in turn is left out; the response scores min(1, k / 3) if k of the others gave it, and the accuracy of a
question is the mean of these scores. Response and answers are normalised only if the annotators' raw answers differ: if
all ten wrote "yes", the responses "Yes" and "yes." score 0. Models are therefore usually made to normalise what they
submit; `normalised_accuracy` is the resulting number and always has its own name.
"""

import re
from collections.abc import Sequence

_ENOUGH = 3  # number of agreeing annotators for full credit
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
_MOST_PERIODS = 32  # the evaluator passes a flag of this value where re.sub takes the count


def _spellings() -> dict[str, str]:
    """Returns contractions by their spellings with one apostrophe missing; "somebody'd" is an error of the
    evaluator."""
    contractions = {"somebody'd": "somebodyd"}
    for word in _CONTRACTIONS.split():
        contractions |= {word[:place] + word[place + 1 :]: word for place, sign in enumerate(word) if sign == "'"}
    return contractions


_SPELLINGS = _spellings()


def normalise(text: str) -> str:
    """Returns the text as the evaluator compares it: lower case, single spaces, digits for number words, without
    articles.

    A punctuation sign becomes a space. It is removed instead if it is next to a space anywhere in the text, or if the
    text contains a number such as 1,000. A full stop is removed unless a digit follows it. Missing apostrophes are
    restored.
    """
    plain = text
    grouped = _GROUPED_DIGITS.search(text) is not None
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        plain = plain.replace(sign, "" if grouped or beside_space else " ")
    plain = _PERIOD.sub("", plain, count=_MOST_PERIODS)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def official_accuracy(response: str, answers: Sequence[str]) -> float:
    """Returns the evaluator's accuracy of one response, within 0..1.

    Args:
      response: response of the model.
      answers: answer of each annotator, at least one (VQA-v2 has ten).
    """
    response, answers = _line(response), [_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        response, answers = normalise(response), [normalise(answer) for answer in answers]
    return _agreement(response, answers)


def normalised_accuracy(response: str, answers: Sequence[str]) -> float:
    """Returns `official_accuracy` of a response that is normalised first, as for most published numbers."""
    return official_accuracy(normalise(_line(response)), answers)


def scores(response: str, answers: Sequence[str], answer_type: str | None) -> dict[str, float]:
    """Returns a transcript row's VQA scores by name: `vqa/official`, `vqa/official_TYPE` and `vqa/normalised`.

    Args:
      response: response of the model.
      answers: answer of each annotator.
      answer_type: type of the answer in the data set: "yes/no", "number", "other"; None gives no score by type.
    """
    accuracy = official_accuracy(response, answers)
    result = {"vqa/official": accuracy, "vqa/normalised": normalised_accuracy(response, answers)}
    if answer_type:
        result["vqa/official_" + re.sub(r"[^a-z0-9]+", "_", answer_type.lower()).strip("_")] = accuracy
    return result


def _line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _agreement(response: str, answers: Sequence[str]) -> float:
    same = [answer == response for answer in answers]
    others = [sum(same) - own for own in same]
    return sum(min(1.0, count / _ENOUGH) for count in others) / len(answers)
