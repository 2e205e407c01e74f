"""The official VQA-v2 metric against a table worked out by hand and an implementation written another way."""

import random

import pytest

from icet_jax.evaluation import vqa

SIGNS = set(';/[]"{}()=+\\_-><@`,?!')
WORDS = {
    word: str(n)
    for n, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])
}
WORDS["none"] = "0"


def mended(word):
    """Puts one missing apostrophe back, by endings and a list of the odd ones instead of a table."""
    odd = {
        "oclock": "o'clock", "maam": "ma'am", "twas": "'twas", "yall": "y'all", "shant": "shan't", "wont": "won't",
        "aint": "ain't", "cant": "can't", "notve": "not've", "somebody'd": "somebodyd", "ow's'at": "'ow's'at",
        "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "yall'll": "y'all'll", "y'allll": "y'all'll",
        "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've", "hed": "he'd", "hes": "he's",
    }  # fmt: skip
    nots = [
        "are",
        "could",
        "did",
        "does",
        "do",
        "had",
        "has",
        "have",
        "is",
        "might",
        "must",
        "need",
        "ought",
        "should",
        "was",
        "were",
        "would",
    ]
    heads = {
        "ve": "could might must should they we what where who would you",
        "d": "how it someone something there they where who you",
        "ll": "how it somebody someone something they what who why you",
        "s": "how somebody someone that there what when where who why",
        "re": "there they what why you",
    }
    table = odd | {f"{head}nt": f"{head}n't" for head in nots}
    table |= {f"{head}{tail}": f"{head}'{tail}" for tail, words in heads.items() for head in words.split()}
    for head in ("could", "had", "might", "should", "would"):
        table |= {f"{head}nt've": f"{head}n't've", f"{head}n'tve": f"{head}n't've"}
    for head in ["he", "it", "she", "somebody", "someone", "something", "there", "they", "we", "who", "you"]:
        table |= {f"{head}d've": f"{head}'d've", f"{head}'dve": f"{head}'d've"}
    return table.get(word, word)


def plain(text):
    """The evaluator's normalisation, letter by letter."""
    grouped = any(
        text[i] == "," and 0 < i < len(text) - 1 and text[i - 1].isdecimal() and text[i + 1].isdecimal()
        for i in range(len(text))
    )
    lost = {
        sign
        for before, sign in zip(" " + text, text + " ", strict=True)
        if sign in SIGNS and before == " " and text.find(" " + sign) >= 0
    } | {sign for sign, after in zip(text, text[1:], strict=False) if sign in SIGNS and after == " "}
    out, stops = "", 0
    spaced = "".join(("" if grouped or letter in lost else " ") if letter in SIGNS else letter for letter in text)
    for place, letter in enumerate(spaced):
        after = spaced[place + 1 : place + 2]
        if letter == "." and not after.isdecimal() and stops < 32:
            stops += 1
        else:
            out += letter
    words = [WORDS.get(word, word) for word in out.lower().split()]
    return " ".join(mended(word) for word in words if word not in {"a", "an", "the"})


def independent(response, answers):
    """Leave-one-out agreement in closed form: of n answers k match, and k of the n cases leave a match out."""
    clean = [" ".join(a.replace("\t", " ").split("\n")).strip(" ").strip() for a in (response, *answers)]
    if len(set(clean[1:])) > 1:
        clean = [plain(text) for text in clean]
    n, k = len(answers), clean[1:].count(clean[0])
    return (k * min(1, (k - 1) / 3) + (n - k) * min(1, k / 3)) / n if k else 0.0


def ten(**counts):
    return [answer.replace("_", " ") for answer, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("response", "answers", "accuracy"),
    [
        ("red", ["red"] * 10, 1.0),
        ("blue", ["red"] * 10, 0.0),
        ("red", ten(red=1, blue=9), 0.3),  # 9 x 1/3 and 1 x 0
        ("red", ten(red=2, blue=8), 0.6),  # 8 x 2/3 and 2 x 1/3
        ("red", ten(red=3, blue=7), 0.9),  # 7 x 1 and 3 x 2/3
        ("red", ten(red=4, blue=6), 1.0),
        ("red", ["red", "blue"], 1 / 6),
        ("Yes", ["yes"] * 10, 0.0),  # nobody disagrees: nothing is normalised
        ("yes.", ["yes"] * 10, 0.0),
        (" yes\n", ["yes"] * 10, 1.0),  # but the ends are trimmed
        ("Yes", ten(yes=9, no=1), 1.0),
        ("yes.", ten(yes=9, no=1), 1.0),
        ("The  two dogs!", ["2 dogs"] * 5 + ["a dog"] * 5, 1.0),
        ("none", ["0"] * 5 + ["1"] * 5, 1.0),
        ("dont walk", ["don't walk"] * 9 + ["walk"], 1.0),
        ("dont walk", ["don't walk"] * 10, 0.0),
        ("t-shirt", ["t shirt"] * 5 + ["shirt"] * 5, 1.0),  # a hyphen between letters is a space
        ("t -shirt", ["t shirt"] * 5 + ["shirt"] * 5, 1.0),  # beside a space it is nothing
        ("t- shirt", ["tshirt"] * 5 + ["shirt"] * 5, 0.0),
        ("1,000", ["1000"] * 5 + ["999"] * 5, 1.0),
        ("1,000/day", ["1000day"] * 5 + ["x"] * 5, 1.0),  # a grouped number makes every sign vanish
        ("3.5", ["3.5"] * 5 + ["35"] * 5, 1.0),
        ("3.", ["3"] * 5 + ["4"] * 5, 1.0),
        ("u.s.", ["us"] * 5 + ["usa"] * 5, 1.0),
        ("10:30", ["10:30"] * 5 + ["10 30"] * 5, 1.0),  # a colon is left alone
        ("man's", ["man's"] * 5 + ["mans"] * 5, 1.0),  # and so is an apostrophe
        ("somebody'd", ["somebodyd"] * 5 + ["x"] * 5, 1.0),
        ("the", ["a"] * 5 + ["x"] * 5, 1.0),  # articles alone are nothing, which equals nothing
        ("", ["yes"] * 9 + ["no"], 0.0),
    ],
)
def test_hard_cases(response, answers, accuracy):
    assert vqa.official_accuracy(response, answers) == pytest.approx(accuracy)
    assert independent(response, answers) == pytest.approx(accuracy)


def test_an_independent_implementation_agrees():
    draw = random.Random(0)
    words = "yes no Two a THE 1,000 3.5 5. U.S. dont don't Im t-shirt 5:30 none and/or what? it's x,y \t \n ... é $5"
    words = [*words.split(" "), *vqa._CORRECTED, *vqa._CONTRACTIONS.split()]

    def text():
        return draw.choice(["", " ", ".", "?", " ,", "- "]).join(draw.choices(words, k=draw.randint(0, 4)))

    seen = set()
    for _ in range(4000):
        pool = [text() for _ in range(draw.randint(1, 3))]
        answers = draw.choices(pool, k=draw.choice([10, 10, 3, 1]))
        response = draw.choice([*pool, text(), pool[0].upper(), pool[0] + "."])
        accuracy = vqa.official_accuracy(response, answers)
        assert accuracy == pytest.approx(independent(response, answers)), (response, answers)
        seen.add(round(accuracy, 3))
    assert len(seen) > 5


def test_normalised_accuracy_forgives_form_where_all_agree():
    assert vqa.normalised_accuracy("Yes.", ["yes"] * 10) == 1.0
    assert vqa.normalised_accuracy("No.", ["yes"] * 10) == 0.0
    assert vqa.normalised_accuracy("The two", ten(**{"2": 3, "three": 7})) == pytest.approx(0.9)


def test_metrics_carry_the_answer_type():
    found = vqa.scores("Yes", ["yes"] * 10, "yes/no")
    assert found == {"vqa/official": 0.0, "vqa/official_yes_no": 0.0, "vqa/normalised": 1.0}
    assert set(vqa.scores("3", ["3"] * 10, None)) == {"vqa/official", "vqa/normalised"}
