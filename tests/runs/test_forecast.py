"""The paragraph before a sweep."""

from icet_jax.evaluation.cost import Cost
from icet_jax.runs.forecast import paragraph


def test_the_paragraph_says_it_all():
    one = Cost(
        rows=7,
        attempts=7,
        answers=14,
        prompt_tokens=42,
        new_tokens=84,
        tower_flops=10**9,
        prompt_flops=8 * 10**9,
        answer_flops=10**9,
        judged={"asr/a": 1500, "ts/service": 14, "tr/none": 0},
        remote_seconds={"ts/service": 7.0},
        seconds=(3.0, 130.0),
    )
    text = paragraph("before a, b", one + one)
    for part in (
        "before a, b: 14 rows x 2 exits = 28 answers; prompts of 6 tokens, answers of at most 6;",
        "2e+10 operations (images 10%, prompts 80%, answers 10%).",
        "6.0 s to 4 min 20 s, without compiling and without the judges.",
        "Responses to judge: asr/a 3,000, ts/service 28.",
        "ts/service asks a service: its rate limit alone makes that 14 s.",
    ):
        assert part in text
    repeated = paragraph("a", Cost(rows=7, attempts=13, answers=26))
    assert "a: 7 rows with 13 attempts x 2 exits = 26 answers;" in repeated
    assert "less than a second" in paragraph("x", Cost(seconds=(0.0, 0.2)))
    assert "\n" not in text and "tr/none" not in text
