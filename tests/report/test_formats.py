"""Attack formats from the published file to the page: reader, prepared set, transcripts, sweep, report."""

import json
from dataclasses import replace

import pytest

from icet_jax import report
from icet_jax.data import prepared
from icet_jax.data.published import read_source
from icet_jax.errors import UserError
from icet_jax.evaluation.scoring import answer_rows, judge
from icet_jax.evaluation.summary import summarise
from icet_jax.evaluation.transcripts import TranscriptFile
from icet_jax.report.loading import load_run, load_runs
from icet_jax.report.sections import formats
from icet_jax.report.study import Study
from icet_jax.report.text import visible
from icet_jax.scorers.keywords import RefusalKeywords
from tests.data import published
from tests.report import synthetic
from tests.report.markup import html as markup
from tests.report.markup import transcript_data
from tests.report.test_page import PAYLOAD, Page
from tests.report.test_paper_run import rows_of

METRIC = "asr/refusal_keywords"
EXITS = (1, 2, 3)
BY_FORMAT = "Attack success rate by attack format, mini"
BY_TRANSFER = "Attack success rate by whether the attack is transferred from a language model, mini"
INTERVAL = " (95% interval, clustered by prompt)"
HEAD = {"schema": 1, "model": "m", "dataset": "mini", "kind": "forbidden", "num_exits": 3, "default_exit": 3}


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    """PNG files take long and have no formats."""
    monkeypatch.setattr("icet_jax.report.figures.write_figures", lambda study, folder: [])


def complies(example, layer, phase):
    """Templates get through at exit 2, half of the others at exit 1; after training nothing does but at exit 1."""
    if phase == "after":
        return layer == 1 and example.id in ("0", "1")
    return layer == 2 if example.format == "Template" else layer == 1 and int(example.id) % 4 == 1


def measure(run, examples, phases=("before", "after")):
    """Writes what a sweep writes about answers that nothing had to generate."""
    for phase in phases:
        file = TranscriptFile(run / f"transcripts/{phase}.mini.jsonl", "mark", "judges", examples)
        for layer in EXITS:
            answers = ["Here it is." if complies(row, layer, phase) else synthetic.REFUSAL for row in examples]
            rows = answer_rows(examples, layer, answers, [5] * len(answers), [0] * len(answers))
            judge(rows, [RefusalKeywords()])
            file.add(rows, judged=True)
        path = run / f"sweeps/{phase}.mini.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(HEAD | summarise(file.finish(EXITS), EXITS, 3)), encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The published format's rows, through a prepared set."""
    folder = tmp_path_factory.mktemp("data")
    records = read_source(published.jailbreakv(folder))
    facts = {"source": "s", "limit": None, "fingerprint": prepared.fingerprint("s", None, records)}
    prepared.write_set(folder / "prepared", "mini", records, facts)
    return prepared.read_set(folder / "prepared", "mini", "s")


@pytest.fixture
def run(tmp_path, examples):
    return measure(tmp_path / "run", examples)


def test_the_files_formats_reach_the_page(run):
    first = json.loads((run / "transcripts/before.mini.jsonl").read_text().split("\n")[0])
    assert (first["format"], first["transferred"]) == ("Template", True)
    page = report.build(run).read_text(encoding="utf-8")
    Page(page)
    section = page.split('<section id="formats">')[1].split("</section>")[0]
    head = [
        "Attack format", "Rows", "Worst exit, before", "Worst exit, after", "Any exit, before", "Any exit, after",
        "Default exit 3, before", "Default exit 3, after",
    ]  # fmt: skip
    assert "".join(f'<th scope="col">{name}</th>' for name in head) in section
    table = rows_of(section, BY_FORMAT + INTERVAL)
    assert [(row[0], row[1]) for row in table] == [("All rows", "12"), ("Template", "6"), ("figstep", "6")]
    _, template, figstep = table
    assert template[2].startswith("100%") and template[2].endswith("exit 2")
    assert figstep[2].startswith("50.0%") and figstep[2].endswith("exit 1")
    assert figstep[3].startswith("16.7% (") and figstep[3].endswith("exit 1")
    assert template[4].startswith("100%") and template[6].startswith("0%") and template[7].startswith("0%")
    transferred = rows_of(section, BY_TRANSFER + INTERVAL)
    assert [row[0] for row in transferred] == ["All rows", "yes", "no"]
    assert transferred[1][1:] == template[1:] and transferred[2][1:] == figstep[1:]
    assert section.count("<rect") == 2 * len(EXITS) * 2 and "by attack format and exit, mini" in section
    data = transcript_data(page)
    formats = [data["formats"][row["format"]] for row in data["rows"][:2]]
    assert formats == ["Template, transferred from a language model", "figstep, not transferred"]


def test_the_worst_exit_has_the_interval_of_a_maximum(run):
    study = Study((load_run(run),))
    table = json.loads((run / "sweeps/before.mini.json").read_text())
    layer, value = study.parts("sweep/mini", "formats")["figstep"].worst("before", "sweep/mini", METRIC)
    entry = table["formats"]["figstep"]["worst_exit"][METRIC]
    assert (layer, value.mean, [value.low, value.high]) == (entry["layer"], entry["mean"], entry["ci95"])
    assert value.n == 6


def test_names_of_formats_are_text(tmp_path, examples):
    named = [replace(row, format=PAYLOAD if row.transferred else row.format) for row in examples]
    page = report.build(measure(tmp_path / "run", named)).read_text(encoding="utf-8")
    assert Page(page).tags.count("script") == 3 and PAYLOAD not in page
    assert any(visible(PAYLOAD) in name for name in transcript_data(page)["formats"]), (
        "the page's script shows it as text"
    )
    assert "&lt;img src=x onerror=alert(1)&gt;⟨U+202E⟩⟨U+2028⟩" in page


def test_runs_of_earlier_versions_have_no_such_section(tmp_path, examples, run):
    old = measure(tmp_path / "old", examples)
    for path in (*old.glob("sweeps/*.json"), *old.glob("transcripts/*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            for name in ("formats", "transferred", "format"):
                line.pop(name, None)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report.build(old).read_text(encoding="utf-8")
    assert '<section id="formats">' not in page and transcript_data(page)["formats"] == []
    # One that was begun before and goes on since has the second half, and says so.
    (run / "sweeps/before.mini.json").write_bytes((old / "sweeps/before.mini.json").read_bytes())
    html = markup(formats.of_study(Study((load_run(run),))))
    assert (
        "The sweep of mini before training has no attack formats: an earlier version prepared or measured its rows."
        in html
    )
    table = rows_of(html, BY_FORMAT + INTERVAL)
    assert table[0][0] == "All rows" and table[0][2] != "–"
    assert [row[2] for row in table[1:]] == ["–", "–"] and table[1][3].endswith("exit 1")


def test_several_seeds_have_their_means_and_ranges(tmp_path, examples):
    measure(tmp_path / "run/seed_0", examples)
    measure(tmp_path / "run/seed_1", examples, phases=("before",))
    study = Study(load_runs(tmp_path / "run"))
    html = markup(formats.of_study(study))
    table = rows_of(html, BY_FORMAT + " (range over 2 seeds)")
    assert table[1][0] == "Template" and table[1][2].startswith("100% (100% to 100%)")
    assert "includes the choice of that exit" not in html


@pytest.mark.parametrize("field", ["formats", "transferred"])
@pytest.mark.parametrize("broken", [{"a": []}, {"a": {"layers": [{"layer": "1", "metrics": {}}]}}])
def test_broken_parts_are_named(run, field, broken):
    path = run / "sweeps/before.mini.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: broken}))
    with pytest.raises(UserError, match=f"before.mini.json: field '{field}' must map"):
        load_run(run)
