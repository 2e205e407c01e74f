"""Where a report says that its numbers come from."""

import json

import pytest

from icet_jax.report.blocks import Details
from icet_jax.report.loading import load_runs
from icet_jax.report.page import render_report
from icet_jax.report.sections import provenance
from icet_jax.report.study import Study
from tests.report import synthetic

START = {
    "date": "2026-11-30T07:00:00+00:00",
    "command": "python -m icet_jax.main --config=configs/mine.py --workdir=/home/someone/runs/mine",
    "version": "0.1.0",
    "commit": "abc1234+",
    "python": "3.11.9",
    "jax": "0.10.2",
    "platform": "Linux-6.1",
    "device": "8 x NVIDIA H200",
    "processes": 2,
}


@pytest.fixture
def run(tmp_path):
    run = synthetic.write_run(tmp_path, parts=("config",))
    config = json.loads((run / "config.json").read_text())
    config["model"] = {"checkpoint": "/data/secret/llava-1.5", "revision": "main", "adapter": None}
    (run / "config.json").write_text(json.dumps(config))
    (run / "run.json").write_text(json.dumps({"schema": 1, "starts": [START, START | {"date": "2026-12-01"}]}))
    (run / "data.json").write_text(json.dumps({"rows": {"train": {"forbidden": 3, "vqa": 4}, "mine": {"benign": 2}}}))
    write_fingerprints(run, "1")
    return run


def write_fingerprints(run, digit):
    rows = {"train": {"a": "00"}, "mine": {"b": f"0{digit}"}}
    content = {"schema": 1, "rows": rows, "checkpoints": {"model": {"model.safetensors": "11"}}}
    (run / "fingerprints.json").write_text(json.dumps(content))


def values(run):
    """Returns the title of the block and {what: its text}."""
    (block,) = provenance.of_study(Study(load_runs(run)))
    assert isinstance(block, Details)
    (table,) = block.blocks
    words = {"".join(span.text for span in row[0]): "".join(span.text for span in row[1]) for row in table.rows}
    return block.summary, words


def test_a_report_names_date_software_hardware_command_checkpoint_data_and_seed(run):
    title, shown = values(run)
    assert title == "Provenance: 2026-11-30 · icet_jax 0.1.0, commit abc1234+ · 8 x NVIDIA H200, 2 processes, " \
        "Linux-6.1 · seed 0"  # fmt: skip
    assert shown["Started"] == "2026-11-30T07:00:00+00:00, 2026-12-01"
    assert shown["Software"] == "icet_jax 0.1.0, commit abc1234+, Python 3.11.9, jax 0.10.2"
    assert shown["Command"] == "python -m icet_jax.main --config=configs/mine.py --workdir=mine"
    assert shown["Checkpoint"].startswith("llava-1.5, revision main fingerprint ")
    assert shown["Rows, train"].startswith("7 fingerprint ") and shown["Rows, mine"].startswith("2 fingerprint ")
    page = render_report(Study(load_runs(run)), run, reveal_unsafe=False)
    assert "Provenance: 2026-11-30" in page and "someone" not in page and "secret" not in page


def test_the_fingerprint_of_a_set_changes_with_its_rows_alone(run):
    _, before = values(run)
    write_fingerprints(run, "2")
    _, after = values(run)
    assert {name for name in before if before[name] != after[name]} == {"Rows, mine"}


def test_a_run_of_an_earlier_version_has_no_provenance(run):
    (run / "run.json").unlink()
    assert provenance.of_study(Study(load_runs(run))) == []
