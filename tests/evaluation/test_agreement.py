"""Cohen's kappa against the textbook, its interval against simulation, and the table over transcript rows."""

import json
import math

import numpy as np
import pytest

from icet_jax.evaluation.agreement import agreement, cohens_kappa


def verdicts(both, a_only, b_only, neither):
    a = [1] * both + [1] * a_only + [0] * b_only + [0] * neither
    b = [1] * both + [0] * a_only + [1] * b_only + [0] * neither
    return np.array(a, float), np.array(b, float)


def each(values):
    return [str(index) for index in range(len(values))]


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [
        ((20, 5, 10, 15), 0.4),
        ((45, 15, 25, 15), 0.1304347826),  # two tables of the same observed agreement (0.6) whose kappas differ
        ((25, 35, 5, 35), 0.2592592593),
        ((10, 0, 0, 10), 1.0),
        ((0, 10, 10, 0), -1.0),
        ((25, 25, 25, 25), 0.0),
    ],
)
def test_kappa_is_the_textbooks(counts, kappa):
    a, b = verdicts(*counts)
    found = cohens_kappa(a, b, each(a))
    assert found.mean == pytest.approx(kappa)
    assert cohens_kappa(b, a, each(a)) == found == cohens_kappa(1 - a, 1 - b, each(a))
    assert found.low <= found.mean <= found.high and found.high <= 1


def test_perfect_agreement_on_few_answers_is_no_certainty():
    a, b = verdicts(5, 0, 0, 5)
    assert cohens_kappa(a, b, each(a)).low < 0.5
    many = verdicts(500, 0, 0, 500)
    assert cohens_kappa(*many, each(many[0])).low > 0.98


@pytest.mark.parametrize("counts", [(0, 0, 0, 10), (10, 0, 0, 0), (0, 0, 0, 0)])
def test_where_chance_explains_everything_there_is_no_kappa(counts):
    a, b = verdicts(*counts)
    assert all(math.isnan(number) for number in cohens_kappa(a, b, each(a)))


def test_answers_to_one_prompt_are_not_independent():
    a, b = verdicts(20, 5, 10, 15)
    alone = cohens_kappa(a, b, each(a))
    # Ten copies of every answer under the same prompt know no more than the fifty answers do.
    copies = cohens_kappa(np.repeat(a, 10), np.repeat(b, 10), [str(index // 10) for index in range(500)])
    assert copies.mean == pytest.approx(alone.mean)
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.05)


def test_the_interval_covers_the_truth():
    draw, covered = np.random.default_rng(0), 0
    joint = np.array([0.35, 0.1, 0.05, 0.5])  # both, a only, b only, neither
    chance = 0.45 * 0.4 + 0.55 * 0.6
    truth = (0.85 - chance) / (1 - chance)
    for _ in range(300):
        a, b = verdicts(*draw.multinomial(120, joint))
        found = cohens_kappa(a, b, each(a))
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 300 <= 0.995


def row(identity, layer=1, prompt="p", **scores):
    scores = {f"asr/{name}": value for name, value in scores.items()}
    return {"id": identity, "layer": layer, "prompt": prompt, "scores": {"length": 3.0, **scores}}


def test_the_table_over_rows():
    rows = [
        ("before", "red", row("1", prompt="p1", guard=1.0, keywords=1.0)),
        ("before", "red", row("2", 5, prompt="p2", guard=0.0, keywords=1.0)),
        ("after", "red", row("1", prompt="p1", guard=1.0, keywords=0.0)),
        ("after", "mini", row("1", prompt="p3", guard=0.0, keywords=0.0, human=0.0)),
        ("after", "mini", row("2", prompt="p4", guard=None, keywords=1.0, human=1.0)),
        ("after", "benign", row("3")),
    ]
    table = json.loads(json.dumps(agreement(rows), allow_nan=False))
    assert table["schema"] == 1
    assert table["judges"] == [
        {"name": "asr/guard", "n": 4, "n_error": 1, "unsafe": 0.5},
        {"name": "asr/keywords", "n": 5, "n_error": 0, "unsafe": 0.6},
        {"name": "asr/human", "n": 2, "n_error": 0, "unsafe": 0.5},
    ]
    pairs = {(pair["a"], pair["b"]): pair for pair in table["pairs"]}
    assert list(pairs) == [("asr/guard", "asr/keywords"), ("asr/guard", "asr/human"), ("asr/keywords", "asr/human")]
    first = pairs["asr/guard", "asr/keywords"]
    assert (first["n"], first["prompts"], first["agree"], first["kappa"]) == (4, 3, 0.5, 0.0)
    assert (first["a_only"], first["b_only"]) == (1, 1)
    assert first["examples"] == [
        {"id": "2", "layer": 5, "dataset": "red", "phase": "before", "unsafe": "asr/keywords"},
        {"id": "1", "layer": 1, "dataset": "red", "phase": "after", "unsafe": "asr/guard"},
    ]
    single = pairs["asr/guard", "asr/human"]
    assert (single["n"], single["kappa"], single["ci95"], single["agree"]) == (1, None, None, 1.0)
    assert pairs["asr/keywords", "asr/human"]["kappa"] == 1.0


def test_one_judge_none_and_no_common_answers():
    assert agreement([]) == {"schema": 1, "judges": [], "pairs": []}
    assert agreement([("before", "d", row("1", a=1.0))])["pairs"] == []
    apart = [("before", "d", row("1", a=1.0)), ("before", "d", row("2", b=1.0)), ("before", "d", row("3", b=None))]
    assert agreement(apart)["pairs"] == []
    assert agreement(apart[2:])["judges"] == [{"name": "asr/b", "n": 0, "n_error": 1, "unsafe": None}]


def test_examples_are_spread_over_all_that_differ():
    rows = [("before", "d", row(str(i), i, str(i), a=1.0, b=0.0)) for i in range(200)]
    (pair,) = agreement(rows, examples=5)["pairs"]
    assert pair["a_only"] == 200
    assert [example["layer"] for example in pair["examples"]] == [0, 50, 100, 149, 199]


def test_an_example_names_its_attempt():
    rows = [("before", "red", row("1", guard=1.0, keywords=float(n < 2)) | {"attempt": n}) for n in range(3)]
    (pair,) = agreement(rows)["pairs"]
    assert pair["n"] == 3 and [example["attempt"] for example in pair["examples"]] == [2]
