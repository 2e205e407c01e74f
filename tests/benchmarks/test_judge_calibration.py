"""The judge of refusal phrases beside people: counts by hand on invented rows, and the numbers that are shipped."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from icet_jax.errors import UserError
from icet_jax.report.loading import load_runs
from icet_jax.report.page import render_report
from icet_jax.report.study import Study
from icet_jax.scorers.calibration import calibrations
from tests.report import synthetic

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("judge_calibration", ROOT / "benchmarks" / "judge_calibration.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["judge_calibration"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["judge_calibration"]


NO, YES = "I cannot help with that.", "Here is how to water a plant:\nwith water"
# (prompt, response, harm of the prompt, harm of the response and how many agree, refusal and how many agree)
WILDGUARD = [
    ("a", YES, "harmful", "harmful", "3", "compliance", "3"),
    ("b", YES, "harmful", "unharmful", "2", "compliance", "3"),
    ("c", NO, "harmful", "unharmful", "3", "refusal", "3"),
    ("d", NO, "harmful", "harmful", "2", "compliance", "2"),
    ("e", YES, "unharmful", "unharmful", "3", "compliance", "3"),
    ("f", YES, "harmful", "\\N", "\\N", "refusal", "2"),
    ("g", NO, "\\N", "unharmful", "3", "\\N", "\\N"),
]
JUDGES = ["harmbench_cf", "gpt4_cf", "llamaguard2_cf", "llama3_cf"]
# (goal, response, three people, majority, four judges)
JAILBREAKBENCH = [
    ("a", YES, 1, 1, 1, 1, 1, 1, 0, 1),
    ("b", YES, 0, 0, 1, 0, 1, 0, 0, 0),
    ("c", NO, 0, 0, 0, 0, 1, 0, 0, 0),
    ("d", NO, 1, 0, 1, 1, 1, 1, 0, 1),
]


def write(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_wildguard(script, folder, rows=WILDGUARD):
    return write(folder / "wildguard.csv", script._WILDGUARD, rows)


def write_jailbreakbench(folder, rows=JAILBREAKBENCH):
    header = ["goal", "target_response", "human1", "human2", "human3", "human_majority", *JUDGES]
    return write(folder / "jbb.csv", header, rows)


def test_wildguard_by_hand(script, tmp_path):
    results = {name: script.both(rows) for name, rows in script.wildguard(write_wildguard(script, tmp_path)).items()}
    harm = results["wildguard_harmful_prompts"]["majority"]  # rows a, b, c, d
    assert (harm["n"], harm["labelled"], harm["judged"]) == (4, 2, 2)
    assert [harm[name]["mean"] for name in ("agree", "precision", "recall", "kappa")] == [0.5, 0.5, 0.5, 0.0]
    sure = results["wildguard_harmful_prompts"]["unanimous"]  # rows a and c
    assert (sure["n"], sure["agree"]["mean"], sure["kappa"]["mean"]) == (2, 1.0, 1.0)
    everything = results["wildguard"]["majority"]  # rows a, b, c, d, e, g
    assert everything["n"] == 6 and everything["agree"]["mean"] == 0.5
    assert everything["precision"]["mean"] == pytest.approx(1 / 3, abs=1e-4)
    refusal = results["wildguard_refusal"]["majority"]  # rows a to f: c is a refusal that has a phrase, f one without
    assert (refusal["n"], refusal["labelled"], refusal["judged"]) == (6, 2, 2)
    assert [refusal[name]["mean"] for name in ("precision", "recall")] == [0.5, 0.5]
    assert refusal["agree"]["mean"] == pytest.approx(4 / 6, abs=1e-4)


def test_jailbreakbench_by_hand(script, tmp_path):
    results = {name: script.both(rows) for name, rows in script.jailbreakbench(write_jailbreakbench(tmp_path)).items()}
    assert list(results) == ["refusal_keywords", *JUDGES]
    assert results["refusal_keywords"]["majority"]["agree"]["mean"] == 0.5
    assert results["gpt4_cf"]["majority"]["kappa"]["mean"] == 1.0
    assert results["harmbench_cf"]["majority"]["precision"]["mean"] == 0.5
    never = results["llamaguard2_cf"]["majority"]  # it never says unsafe
    assert never["precision"] == {"mean": None, "ci95": None} and never["recall"]["mean"] == 0.0
    assert results["refusal_keywords"]["unanimous"]["n"] == 2  # rows a and c


def test_intervals_hold_their_means_and_count_prompts(script, tmp_path):
    rows = [(f"p{i % 5}", YES if i % 3 else NO, 1, 1, i % 2, 1, 1, 1, 1, 1) for i in range(40)]
    row = script.both(script.jailbreakbench(write_jailbreakbench(tmp_path, rows))["refusal_keywords"])["majority"]
    low, high = row["agree"]["ci95"]
    assert low < row["agree"]["mean"] < high
    own = [(f"p{i}", *row[1:]) for i, row in enumerate(rows)]
    alone = script.both(script.jailbreakbench(write_jailbreakbench(tmp_path, own))["refusal_keywords"])["majority"]
    assert alone["agree"]["mean"] == row["agree"]["mean"] and alone["agree"]["ci95"] != row["agree"]["ci95"]


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [(2, "2", "human1 of row 1 is none of"), (5, "0", "human_majority of row 1 is not that of")],
)
def test_another_file_is_one_line(script, tmp_path, column, value, says):
    rows = [list(map(str, row)) for row in JAILBREAKBENCH]
    rows[0][column] = value
    with pytest.raises(UserError, match=says):
        script.jailbreakbench(write_jailbreakbench(tmp_path, rows))
    with pytest.raises(UserError, match="response_harm_label"):
        script.wildguard(write_jailbreakbench(tmp_path))


def test_it_writes_numbers_and_no_text(script, tmp_path):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (root / "icet_jax" / "scorers").mkdir(parents=True)
    (root / "docs" / "judging.md").write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    files = write_wildguard(script, tmp_path), write_jailbreakbench(tmp_path)
    script.main([f"--wildguard={files[0]}", f"--jailbreakbench={files[1]}", f"--root={root}"])
    written = [path.read_text() for path in root.rglob("*") if path.is_file()]
    assert len(written) == 3 and not any("plant" in text or "cannot help" in text for text in written)
    page = (root / "docs" / "judging.md").read_text()
    assert page.startswith("before\n") and page.endswith("\nafter\n") and "old" not in page
    assert "| WildGuard, harmful prompts | refusal_keywords | 4 | 50% " in page


def test_the_shipped_numbers_are_those_of_the_present_judge_and_of_the_page(script):
    content = json.loads((ROOT / "docs" / "judge_calibration.json").read_text())
    shipped = json.loads((ROOT / "icet_jax" / "scorers" / "calibration.json").read_text())
    assert content["phrases"] == shipped["phrases"] == script.phrases_digest(), (
        "run benchmarks/judge_calibration.py again"
    )
    assert shipped == script.for_reports(content)
    page = (ROOT / "docs" / "judging.md").read_text()
    assert script.with_tables(page, content) == page
    # Of the published file. Other numbers mean that the script, the refusal phrases or the file have changed.
    judges = content["results"]["jailbreakbench"]
    agreement = {name: round(100 * sides["majority"]["agree"]["mean"], 1) for name, sides in judges.items()}
    assert agreement == {
        "refusal_keywords": 56.0, "harmbench_cf": 78.3, "gpt4_cf": 90.3, "llamaguard2_cf": 87.7, "llama3_cf": 90.7
    }  # fmt: skip


def test_a_report_shows_the_agreement_beside_the_asr(tmp_path):
    run = synthetic.write_run(tmp_path / "run")
    page = render_report(Study(load_runs(run)), run, reveal_unsafe=False)
    people = calibrations()["refusal_keywords"]
    assert f"agrees with people on {100 * people.agree:.0f}% of {people.n} of WildGuard’s responses to harmful" in page
    assert page.count("agrees with people") == 1  # the other judges of the run were not compared
