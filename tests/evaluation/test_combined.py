"""What an attacker reaches who may try every exit and several answers: against plain loops over the rows."""

import itertools
import math

import numpy as np
import pytest

from icet_jax.evaluation.combined import any_attempt_metric, any_exit_metric, family_of
from icet_jax.evaluation.statistics import mean_interval, paired_interval
from icet_jax.evaluation.summary import difference, summarise

EXITS = [1, 2, 3, 4]


def row(identity, layer, verdict, *, attempt=0, prompt=None, **more):
    scores = {} if verdict == "not asked" else {"asr/x": verdict}
    numbered = {"attempt": attempt} if attempt else {}
    prompt = f"prompt {identity}" if prompt is None else prompt
    return {"id": identity, "layer": layer, "prompt": prompt, "scores": scores, **numbered, **more}


def draw(seed, *, rows=30, attempts=3, prompts=9):
    """Verdicts of every (row, exit, attempt): mostly safe, some errors, several rows of each prompt."""
    rng = np.random.default_rng(seed)
    places = itertools.product(range(rows), EXITS, range(attempts))
    verdicts = [1.0, None, *[0.0] * 18]
    return [
        row(f"r{n}", layer, verdicts[rng.integers(20)], attempt=attempt, prompt=f"p{n % prompts}")
        for n, layer, attempt in places
    ]


def combined(verdicts):
    """1 with an unsafe verdict; without one 0, or unknown if any is an error."""
    if any(verdict == 1 for verdict in verdicts):
        return 1.0
    return math.nan if any(verdict is None for verdict in verdicts) else 0.0


def by_row(rows, layers=EXITS):
    """{id: combined verdict over these exits and all attempts}, and the prompts."""
    verdicts, prompts = {}, {}
    for one in rows:
        if one["layer"] in layers:
            verdicts.setdefault(one["id"], []).append(one["scores"]["asr/x"])
            prompts[one["id"]] = one["prompt"]
    return {identity: combined(of_row) for identity, of_row in verdicts.items()}, list(prompts.values())


def same(estimate, values, interval):
    unknown = sum(map(math.isnan, values))
    assert (estimate["n"], estimate["n_error"]) == (len(values) - unknown, unknown)
    assert estimate["mean"] == pytest.approx(interval.mean) and estimate["ci95"] == pytest.approx(interval[1:])


@pytest.mark.parametrize("attempts", [1, 3])
def test_any_exit_is_that_of_a_loop_over_rows(attempts):
    rows = draw(0, attempts=attempts)
    (name, estimate), *others = summarise(reversed(rows), EXITS, 4)["any_exit"].items()
    verdicts, prompts = by_row(rows)
    values = list(verdicts.values())
    assert name == ("asr_any/x" if attempts == 1 else "asr_any@3/x") and not others
    assert 0 < sum(map(math.isnan, values)) < 15 and estimate["mean"] == pytest.approx(np.nanmean(values))
    same(estimate, values, mean_interval(np.array(values), prompts, share=True))


def test_any_attempt_is_that_of_a_loop_and_other_metrics_are_means_over_attempts():
    rows = draw(1)
    tables = summarise(rows, EXITS, 4)
    for place, layer in enumerate(EXITS):
        metrics = tables["layers"][place]["metrics"]
        assert set(metrics) == {"asr/x", "asr@3/x"} and tables["layers"][place]["n"] == 90
        verdicts, prompts = by_row(rows, [layer])
        values = list(verdicts.values())
        same(metrics["asr@3/x"], values, mean_interval(np.array(values), prompts, share=True))
        answers = [one for one in rows if one["layer"] == layer]
        values = [math.nan if one["scores"]["asr/x"] is None else one["scores"]["asr/x"] for one in answers]
        prompts = [one["prompt"] for one in answers]
        same(metrics["asr/x"], values, mean_interval(np.array(values), prompts, share=True))
    shares = [layer["metrics"]["asr@3/x"]["mean"] for layer in tables["layers"]]
    assert tables["worst_exit"]["asr@3/x"]["mean"] == max(shares)
    assert tables["groups"]["average"]["metrics"]["asr@3/x"]["mean"] == pytest.approx(
        (np.mean(shares[:2]) + shares[2] + shares[3]) / 3
    )


def test_a_quarter_at_every_exit_can_be_every_prompt():
    """Each exit complies with another quarter of the prompts: no exit is worse than 25 %, all together get 100 %."""
    rows = [row(str(n), layer, float(n % 4 == layer - 1)) for n in range(100) for layer in EXITS]
    tables = summarise(rows, EXITS, 4)
    assert [layer["metrics"]["asr/x"]["mean"] for layer in tables["layers"]] == pytest.approx([0.25] * 4)
    assert tables["worst_exit"]["asr/x"]["mean"] == pytest.approx(0.25)
    estimate = tables["any_exit"]["asr_any/x"]
    assert (estimate["mean"], estimate["n"], estimate["n_error"]) == (pytest.approx(1.0), 100, 0)
    assert 0.95 < estimate["ci95"][0] < 1 and estimate["ci95"][1] == pytest.approx(1)
    nested = [row(str(n), layer, float(n % 4 == 0)) for n in range(100) for layer in EXITS]
    assert summarise(nested, EXITS, 4)["any_exit"]["asr_any/x"]["mean"] == pytest.approx(0.25)


def test_rows_of_one_prompt_are_one_observation():
    copies = [
        row(f"{n}-{copy}", layer, float(n % 2 == layer % 2 == 0), prompt=f"p{n}")
        for n in range(8) for copy in range(40) for layer in (1, 2)
    ]  # fmt: skip
    single = [one for one in copies if one["id"].endswith("-0")]
    many, few = (summarise(rows, [1, 2], 4)["any_exit"]["asr_any/x"] for rows in (copies, single))
    assert (many["n"], few["n"]) == (320, 8) and many["mean"] == few["mean"] == 0.5
    assert many["ci95"] == pytest.approx(few["ci95"], abs=0.05)


def test_rows_that_were_not_judged_everywhere_are_left_out():
    """People label a few answers: a row that was looked at once must not count as much as one looked at everywhere."""
    rows = [row("a", layer, 1.0 if layer == 2 else "not asked") for layer in EXITS]
    assert "any_exit" not in summarise(rows, EXITS, 4)
    rows += [row("b", layer, 0.0) for layer in EXITS] + [row("c", 1, 1.0)]
    assert summarise(rows, EXITS, 4)["any_exit"]["asr_any/x"] == {"mean": 0.0, "ci95": None, "n": 1, "n_error": 0}


def test_differences_are_paired_by_row_and_attempt():
    before, after = draw(2), draw(3)
    after = [one for one in after if one["id"] != "r4"]
    tables = difference(before, after, EXITS, 4)
    (old, prompts), (new, _) = by_row(before), by_row(after)
    prompts = dict(zip(old, prompts, strict=True))
    sides = [np.array([side[identity] for identity in new]) for side in (old, new)]
    interval = paired_interval(*sides, [prompts[identity] for identity in new], share=True)
    same(tables["any_exit"]["asr_any@3/x"], list(sides[1] - sides[0]), interval)
    assert tables["layers"][0]["n"] == 29 * 3 and "asr@3/x" in tables["layers"][0]["metrics"]
    assert "any_exit" not in difference(before, draw(3, attempts=1), EXITS, 4), "another number of attempts"


def test_formats_have_any_exit_of_their_own():
    rows = [
        row(str(n), layer, float(n == layer), format="SD" if n < 2 else "Logic") for n in range(4) for layer in EXITS
    ]
    formats = summarise(rows, EXITS, 4)["formats"]
    shares = {name: part["any_exit"]["asr_any/x"]["mean"] for name, part in formats.items()}
    assert shares == {"SD": 0.5, "Logic": 1.0}


def test_names():
    assert any_attempt_metric("asr/llama_guard_3_8b", 5) == "asr@5/llama_guard_3_8b"
    assert [any_exit_metric("asr/a", count) for count in (1, 5)] == ["asr_any/a", "asr_any@5/a"]
    families = {"asr/a@b": "asr", "asr@5/a": "asr@k", "asr_any@5/a": "asr_any@k", "length": "length"}
    assert {name: family_of(name) for name in families} == families
