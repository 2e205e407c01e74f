"""People's labels on a run's answers: out as CSV, back into tables, agreement and report."""

import csv
import json

import pytest

from icet_jax import main, report
from icet_jax.config import default
from icet_jax.evaluation.summary import difference, summarise
from icet_jax.runs import run_dir
from icet_jax.runs.agreement import write_agreement

LAYERS, NUM_EXITS = [1, 2, 3], 3


def rows(phase, kind="forbidden"):
    """Six placeholder prompts at three exits; the guard calls every other answer unsafe before training."""
    found = []
    for number in range(6):
        for layer in LAYERS:
            unsafe = phase == "before" and number % 2 == 0
            found.append(
                {
                    "id": f"{kind}-{number}",
                    "layer": layer,
                    "prompt": f"placeholder {kind} request {number}",
                    "response": f"=placeholder {phase} answer {number} {layer}",
                    "kind": kind,
                    "scores": {"length": 4.0} | ({"asr/guard": float(unsafe)} if kind == "forbidden" else {}),
                    "labels": {},
                    "sweep": "mark",
                }
            )
    return found


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def a_run(workdir, **changes):
    config = default()
    config.unlock().update(changes)
    run_dir.claim(workdir, config)
    for folder in [workdir / f"seed_{seed}" for seed in config.seeds] or [workdir]:
        for kind in ("forbidden", "benign"):
            for phase in ("before", "after"):
                lines = "".join(json.dumps(row) + "\n" for row in rows(phase, kind))
                (folder / "transcripts").mkdir(parents=True, exist_ok=True)
                (folder / "transcripts" / f"{phase}.{kind}.jsonl").write_text(lines)
                head = {"schema": 1, "model": "m", "dataset": kind, "kind": kind, "num_exits": NUM_EXITS, "own": 1}
                tables = summarise(rows(phase, kind), LAYERS, NUM_EXITS)
                write_json(folder / "sweeps" / f"{phase}.{kind}.json", head | tables)
            tables = difference(rows("before", kind), rows("after", kind), LAYERS, NUM_EXITS)
            write_json(folder / "sweeps" / f"difference.{kind}.json", {"schema": 1, "dataset": kind} | tables)
    return workdir


def labels(workdir, *arguments):
    return main.main(["--mode=labels", f"--workdir={workdir}", *map(str, arguments)])


def read(path):
    return json.loads(path.read_text())


def fill(path, word):
    """Fills in `unsafe` with `word(row)`."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        found = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(row | {"unsafe": word(row)} for row in found)
    return found


@pytest.fixture
def reports(monkeypatch):
    """Which folders' reports were built, without building them."""
    built = []
    monkeypatch.setattr(report, "build", lambda folder, *, reveal_unsafe: built.append(folder) or folder / "r.html")
    return built


def test_labels_there_and_back(tmp_path, reports, capsys):
    workdir, out = a_run(tmp_path / "run"), tmp_path / "labels.csv"
    assert labels(workdir, f"--out={out}", "--rows=12") == 0
    assert "12 of 36 answers" in capsys.readouterr().err and reports == []
    sampled = fill(out, lambda row: "yes" if row["phase"] == "before" else "no")
    assert len(sampled) == 12 and not any(row["unsafe"] for row in sampled)
    assert {row["dataset"] for row in sampled} == {"forbidden"} and "asr/guard" not in sampled[0]
    before = {path: path.read_bytes() for path in (workdir / "sweeps").glob("*.benign.json")}

    assert labels(workdir, f"--labels={out}") == 0
    assert "12 labels, 6 of them unsafe" in capsys.readouterr().err and reports == [workdir]
    table = read(workdir / "sweeps" / "before.forbidden.json")
    assert table["own"] == 1 and [layer["n"] for layer in table["layers"]] == [6, 6, 6]
    human = [layer["metrics"]["asr/human"] for layer in table["layers"]]
    assert [(entry["mean"], entry["n"], entry["n_error"]) for entry in human] == [(1.0, 2, 0)] * 3
    assert [layer["metrics"]["asr/guard"]["n"] for layer in table["layers"]] == [6, 6, 6]
    change = read(workdir / "sweeps" / "difference.forbidden.json")
    assert [layer["metrics"]["asr/human"]["mean"] for layer in change["layers"]] == [-1.0] * 3
    assert change["dataset"] == "forbidden" and change["groups"]["average"]["metrics"]["asr/human"]["n"] == 6
    assert all(json.loads(data) == read(path) for path, data in before.items())

    keyed = {row["id"] + row["layer"] for row in sampled if row["phase"] == "before"}
    for line in (workdir / "transcripts" / "before.forbidden.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["sweep"] == "mark" and row["response"].startswith("=placeholder")
        labelled = f"{row['id']}{row['layer']}" in keyed
        assert row["scores"].get("asr/human") == (1.0 if labelled else None)
        assert row["labels"] == ({"asr/human": "unsafe"} if labelled else {})

    (pair,) = read(workdir / "agreement.json")["pairs"]
    assert (pair["a"], pair["b"], pair["n"], pair["a_only"]) == ("asr/guard", "asr/human", 12, 0)
    assert pair["agree"] == 1 - pair["b_only"] / 12


def test_labels_may_come_in_parts_and_be_corrected(tmp_path, reports):
    workdir, out = a_run(tmp_path / "run"), tmp_path / "labels.csv"
    labels(workdir, f"--out={out}", "--rows=36")
    for word in (lambda row: "yes" if row["layer"] == "1" else "", lambda row: "" if row["layer"] == "1" else "no"):
        fill(out, word)
        assert labels(workdir, f"--labels={out}") == 0
    table = read(workdir / "sweeps" / "after.forbidden.json")
    assert [layer["metrics"]["asr/human"]["mean"] for layer in table["layers"]] == pytest.approx([1.0, 0.0, 0.0])
    fill(out, lambda row: "no")
    first = labels(workdir, f"--labels={out}"), read(workdir / "sweeps" / "after.forbidden.json")
    assert (labels(workdir, f"--labels={out}"), read(workdir / "sweeps" / "after.forbidden.json")) == first
    assert first[1]["layers"][0]["metrics"]["asr/human"]["mean"] == 0.0


def test_several_seeds(tmp_path, reports):
    workdir, out = a_run(tmp_path / "run", seeds=(0, 1)), tmp_path / "labels.csv"
    assert labels(workdir, f"--out={out}", "--rows=24") == 0
    sampled = fill(out, lambda row: "yes" if row["run"] == "seed_0" else "no")
    assert {row["run"] for row in sampled} == {"seed_0", "seed_1"}
    assert labels(workdir, f"--labels={out}") == 0
    assert reports == [workdir / "seed_0", workdir / "seed_1", workdir]
    for seed, mean in ((0, 1.0), (1, 0.0)):
        table = read(workdir / f"seed_{seed}" / "sweeps" / "before.forbidden.json")
        assert [layer["metrics"]["asr/human"]["mean"] for layer in table["layers"]] == [mean] * 3


def test_verdicts_are_shown_when_asked_for(tmp_path):
    workdir, out = a_run(tmp_path / "run"), tmp_path / "labels.csv"
    assert labels(workdir, f"--out={out}", "--verdicts") == 0
    assert {row["asr/guard"] for row in fill(out, lambda row: "")} == {"unsafe", "safe"}


def test_the_report_shows_people_as_a_judge(tmp_path, monkeypatch):
    from tests.report.synthetic import write_run

    monkeypatch.setattr("icet_jax.report.figures.write_figures", lambda *_: None)
    workdir, out = write_run(tmp_path / "run"), tmp_path / "labels.csv"
    (workdir / "config.json").unlink()
    run_dir.claim(workdir, default())
    assert labels(workdir, f"--out={out}", "--rows=40") == 0
    fill(out, lambda row: "no")
    assert labels(workdir, f"--labels={out}") == 0
    assert "asr/human" in (workdir / "report.html").read_text()


def test_a_file_with_labels_is_not_written_over(tmp_path, capsys):
    workdir, out = a_run(tmp_path / "run"), tmp_path / "labels.csv"
    out.write_text("mine")
    assert labels(workdir, f"--out={out}") == 2
    assert "may hold labels" in capsys.readouterr().err and out.read_text() == "mine"


def test_labels_of_another_run_change_nothing(tmp_path, reports, capsys):
    workdir, out = a_run(tmp_path / "run"), tmp_path / "labels.csv"
    labels(workdir, f"--out={out}")
    fill(out, lambda row: "yes")
    for phase in ("before", "after"):
        path = workdir / "transcripts" / f"{phase}.forbidden.jsonl"
        path.write_text(path.read_text().replace("answer", "other answer"))
    state = {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}
    assert labels(workdir, f"--labels={out}") == 2
    printed = capsys.readouterr().err
    assert "36 rows left out: not an answer of this run, or the answer has changed" in printed
    assert "gives no verdict" in printed and reports == []
    assert state == {file: file.read_bytes() for file in workdir.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either --out=labels.csv"),
        (["--out=a.csv", "--labels=b.csv"], "either --out=labels.csv"),
        (["--out=a.csv", "--rows=0"], "--rows=0: must be above 0"),
        (["--labels=none.csv"], "none.csv: cannot be read"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert labels(a_run(tmp_path / "run"), *arguments) == 2
    printed = capsys.readouterr().err
    assert says in printed and printed.count("\n") == 1


def test_a_folder_without_a_run_or_a_sweep_is_one_line(tmp_path, capsys):
    assert labels(tmp_path, "--out=labels.csv") == 2
    assert "no run (config.json) is there" in capsys.readouterr().err
    run_dir.claim(tmp_path, default())
    assert labels(tmp_path, "--out=labels.csv") == 2
    assert "no finished sweep of forbidden rows" in capsys.readouterr().err
    assert main.main(["--mode=labels", "--out=labels.csv"]) == 2


def test_an_unfinished_sweep_is_not_sampled_nor_compared(tmp_path):
    workdir, out = a_run(tmp_path / "run"), tmp_path / "labels.csv"
    (workdir / "sweeps" / "after.forbidden.json").unlink()
    assert labels(workdir, f"--out={out}", "--rows=100") == 0
    assert {row["phase"] for row in fill(out, lambda row: "")} == {"before"}
    (judge,) = write_agreement(workdir)["judges"]
    assert judge == {"name": "asr/guard", "n": 18, "n_error": 0, "unsafe": 0.5}


def test_a_broken_transcript_is_one_line(tmp_path, capsys):
    workdir = a_run(tmp_path / "run")
    (workdir / "transcripts" / "before.forbidden.jsonl").write_text('{"id": "1"}\n')
    assert labels(workdir, f"--out={tmp_path / 'l.csv'}") == 2
    assert "row 1 lacks kind" in capsys.readouterr().err
