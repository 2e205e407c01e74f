"""Tables from rows: what is averaged, what is counted as an error, what is left out."""

import json

import numpy as np
import pytest

from icet_jax.evaluation.summary import difference, summarise


def row(identity, layer, scores, prompt=None):
    prompt = f"prompt {identity}" if prompt is None else prompt
    return {"id": identity, "layer": layer, "prompt": prompt, "kind": "forbidden", "response": "", "scores": scores}


def test_means_errors_and_metrics_that_do_not_apply():
    rows = [
        row("a", 1, {"asr/x": 1.0, "tr/r": 0.5}),
        row("b", 1, {"asr/x": 0.0, "tr/r": None}),
        row("c", 1, {"refusal/x": 1.0}),
        row("a", 2, {"asr/x": 0.0, "tr/r": 2.5}),
        row("b", 2, {"asr/x": 0.0, "tr/r": None}),
        row("c", 2, {"tr/r": None}),
    ]
    table = summarise(rows, [1, 2], 6)
    first, second = table["layers"]
    assert (first["layer"], first["n"]) == (1, 3)
    assert first["metrics"]["asr/x"]["mean"] == 0.5 and first["metrics"]["asr/x"]["n"] == 2
    assert first["metrics"]["tr/r"] == {"mean": 0.5, "ci95": None, "n": 1, "n_error": 1}
    assert second["metrics"]["tr/r"]["n_error"] == 2
    assert "refusal/x" in first["metrics"] and "refusal/x" not in second["metrics"]
    low, high = first["metrics"]["asr/x"]["ci95"]
    assert 0 <= low < 0.5 < high <= 1
    json.dumps(table, allow_nan=False)


@pytest.mark.parametrize("family", ["ts", "p_unsafe"])
def test_intervals_of_numbers_within_0_and_1_stay_there(family):
    rows = [
        row(name, 1, {f"{family}/x": value, "tr/x": value}) for name, value in zip("abc", (0, 0.01, 0.9), strict=True)
    ]
    metrics = summarise(rows, [1], 6)["layers"][0]["metrics"]
    assert metrics[f"{family}/x"]["ci95"] == [0.0, 1.0]
    assert metrics["tr/x"]["ci95"][0] < 0 and metrics["tr/x"]["ci95"][1] > 1


def test_a_layer_of_errors_alone_has_no_mean():
    table = summarise([row("a", 1, {"tr/r": None})], [1], 3)
    assert table["layers"][0]["metrics"]["tr/r"] == {"mean": None, "ci95": None, "n": 0, "n_error": 1}


def test_groups_are_means_of_layer_means():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 5))
    rows = [row(str(i), layer + 1, {"tr/r": values[layer, i]}) for i in range(5) for layer in range(8)]
    table = summarise(reversed(rows), range(1, 9), 8)
    means = values.mean(axis=1)
    parts = [means[:3].mean(), means[3:6].mean(), means[6:].mean()]
    got = {name: group["metrics"]["tr/r"]["mean"] for name, group in table["groups"].items()}
    np.testing.assert_allclose(list(got.values()), [*parts, np.mean(parts)])
    assert table["groups"]["late"]["layers"] == [7, 8] and "layers" not in table["groups"]["average"]
    assert table["groups"]["middle"]["metrics"]["tr/r"]["n"] == 15
    assert summarise(rows, [1, 2], 8)["groups"] == {}


def test_the_worst_exit_of_each_judge():
    rows = [row(str(n), layer, {"asr/x": float(n < layer), "tr/x": 1.0}) for n in range(6) for layer in (1, 2, 4)]
    rows += [row("6", layer, {"asr/x": None}) for layer in (1, 2, 4)]
    table = summarise(rows, [1, 2, 4], 6)
    worst = table["worst_exit"]["asr/x"]
    alone = table["layers"][2]["metrics"]["asr/x"]["ci95"]
    assert list(table["worst_exit"]) == ["asr/x"]
    assert (worst["layer"], worst["mean"], worst["n"], worst["n_error"]) == (4, pytest.approx(4 / 6), 6, 1)
    assert worst["ci95"][0] <= alone[0] and worst["ci95"][1] >= alone[1]
    assert "worst_exit" not in summarise([row("a", 1, {"refusal/x": 1.0})], [1], 3)


def test_policies_have_tables_of_their_own():
    rows = [
        row("a", 1, {"asr/x": 1.0, "tr/r": 2.0}) | {"policy": "odd"},
        row("b", 1, {"asr/x": 0.0}) | {"policy": "odd"},
        row("c", 1, {"asr/x": None}) | {"policy": "even"},
        row("d", 1, {"asr/x": 1.0}),
        *(row(str(index), 1, {"asr/x": 1.0}) | {"policy": f"p{index}"} for index in range(100)),
    ]
    policies = summarise(rows, [1, 2], 6)["policies"]
    assert list(policies)[:3] == ["odd", "even", "p0"] and len(policies) == 64
    first, second = policies["odd"]
    assert (first["layer"], first["n"], second["n"]) == (1, 2, 0)
    assert first["metrics"]["asr/x"]["mean"] == 0.5 and set(first["metrics"]) == {"asr/x"}
    assert policies["even"][0]["metrics"]["asr/x"] == {"mean": None, "ci95": None, "n": 0, "n_error": 1}
    assert "policies" not in summarise(rows[3:4], [1, 2], 6)


def test_attack_formats_have_tables_of_their_own():
    rows = [
        row("a", 1, {"asr/x": 1.0, "tr/r": 2.0}) | {"format": "Logic", "transferred": True},
        row("b", 1, {"asr/x": 0.0}) | {"format": "Logic", "transferred": True},
        row("a", 2, {"asr/x": 1.0}) | {"format": "Logic", "transferred": True},
        row("b", 2, {"asr/x": 1.0}) | {"format": "Logic", "transferred": True},
        row("c", 1, {"asr/x": None}) | {"format": "SD", "transferred": False},
        row("d", 1, {"asr/x": 1.0}),
        row("e", 1, {"asr/x": 1.0}) | {"format": ""},
    ]
    table = summarise(rows, [1, 2], 6)
    assert list(table["formats"]) == ["Logic", "SD"] and list(table["transferred"]) == ["yes", "no"]
    assert table["formats"]["Logic"] == table["transferred"]["yes"]
    logic = table["formats"]["Logic"]
    alone = summarise(rows[:4], [1, 2], 6)
    assert [layer["metrics"]["asr/x"] for layer in logic["layers"]] == [
        layer["metrics"]["asr/x"] for layer in alone["layers"]
    ]
    assert set(logic["layers"][0]["metrics"]) == {"asr/x"} and logic["layers"][0]["n"] == 2
    assert logic["worst_exit"] == alone["worst_exit"] and logic["worst_exit"]["asr/x"]["layer"] == 2
    assert table["formats"]["SD"]["layers"][0]["metrics"]["asr/x"]["n_error"] == 1
    assert "worst_exit" not in table["formats"]["SD"]
    assert not {"formats", "transferred"} & set(summarise(rows[5:], [1, 2], 6))


def test_intervals_of_a_format_are_clustered_by_prompt():
    """Rows that repeat one prompt are one observation: they do not make the interval narrow."""
    rows = [
        row(f"{prompt}-{copy}", 1, {"asr/x": float(prompt % 2)}) | {"prompt": f"p{prompt}", "format": "SD"}
        for prompt in range(6)
        for copy in range(50)
    ]
    single = [one for one in rows if one["id"].endswith("-0")]
    repeated, once = (
        summarise(part, [1], 3)["formats"]["SD"]["layers"][0]["metrics"]["asr/x"] for part in (rows, single)
    )
    assert repeated["n"] == 300 and once["n"] == 6
    assert repeated["ci95"] == pytest.approx(once["ci95"], abs=0.05)


PAPER_GROUPS = {
    "asr": (0.7538, 0.7, 0.485, 0.6462),
    "ts": (0.0824, 0.129, 0.11, 0.1071),
    "tr": (0.57, -0.34, -0.52, -0.09),
}


@pytest.mark.parametrize(("family", "wanted"), PAPER_GROUPS.items())
def test_groups_follow_the_papers_arithmetic(family, wanted):
    """24 layers that scatter about the paper's group means give its Early, Middle, Late and rounded Average."""
    scatter = np.random.default_rng(0).normal(size=(3, 8))
    values = (np.array(wanted[:3])[:, None] + scatter - scatter.mean(axis=1, keepdims=True)).ravel()
    rows = [row(identity, layer + 1, {f"{family}/x": values[layer]}) for identity in "ab" for layer in range(24)]
    groups = summarise(rows, range(1, 25), 24)["groups"]
    got = [groups[name]["metrics"][f"{family}/x"]["mean"] for name in ("early", "middle", "late", "average")]
    assert got[:3] == pytest.approx(list(wanted[:3]))
    assert got[3] == pytest.approx(wanted[3], abs=0.01 if family == "tr" else 1.01e-4)


def test_difference_pairs_rows_by_id():
    before = [row("a", 1, {"asr/x": 1.0}), row("b", 1, {"asr/x": 1.0}), row("c", 1, {"asr/x": None})]
    after = [row("c", 1, {"asr/x": 1.0}), row("b", 1, {"asr/x": 0.0}), row("d", 1, {"asr/x": 1.0})]
    table = difference(before, after, [1], 1)
    estimate = table["layers"][0]["metrics"]["asr/x"]
    assert table["layers"][0]["n"] == 2
    assert (estimate["mean"], estimate["n"], estimate["n_error"]) == (-1.0, 1, 1)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_difference_of_groups(shift):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(3, 12))

    def rows(extra):
        return [row(str(i), layer + 1, {"tr/r": values[layer, i] + extra}) for i in range(12) for layer in range(3)]

    table = difference(rows(0.0), rows(shift), [1, 2, 3], 3)
    average = table["groups"]["average"]["metrics"]["tr/r"]
    assert average["mean"] == pytest.approx(shift, abs=1e-12)
    assert average["ci95"] == pytest.approx([shift, shift], abs=1e-9)


def test_distinct_prompts_are_counted():
    rows = [row(name, 1, {"refusal/x": 1.0}) | {"prompt": prompt} for name, prompt in zip("abc", "ppq", strict=True)]
    assert summarise(rows, [1], 3)["prompts"] == 2
