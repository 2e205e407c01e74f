"""With `config.sweep.show_prompts=False`, no page and no card holds a text or a picture of a row."""

import json
import shutil

import pytest

from icet_jax.report import transcripts
from icet_jax.report.comparison import load_comparison
from icet_jax.report.loading import load_runs
from icet_jax.report.page import render_comparison, render_report
from icet_jax.report.study import Study
from icet_jax.runs import model_card
from tests.report import synthetic
from tests.report.markup import unpacked

WORD = "qwertysecret"


@pytest.fixture
def run(tmp_path):
    """A run whose rows all hold `WORD` in every text, the labels of scorers included."""
    run = synthetic.write_run(tmp_path / "run")
    for path in (run / "transcripts").glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        texts = {"prompt": f"say {WORD}", "response": f"{WORD} is said", "answer": WORD, "labels": {"asr/a": WORD}}
        path.write_text("".join(json.dumps(row | texts | {"kind": "benign"}) + "\n" for row in rows))
    return run


def configure(run, **sweep):
    path = run / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"sweep": config.get("sweep", {}) | sweep}))
    return run


def pages(run):
    study = Study(load_runs(run))
    other = shutil.copytree(run, run.parent / "other", dirs_exist_ok=True)
    return [
        *(unpacked(render_report(study, run, reveal_unsafe=reveal)) for reveal in (False, True)),
        render_comparison(load_comparison([run, other])),
        model_card.text(run),
    ]


def test_a_page_of_a_run_that_hides_its_prompts_holds_ids_and_scores(run):
    report, revealing, *_ = pages(configure(run, show_prompts=False))
    for page in (report, revealing):
        assert "row forbidden-0" in page and "a row is named by its id" in page and "[not shown]" in page
        assert "data:image/png" not in page and "data:image/webp" not in page
        assert "asr/world_exact" in page
    (first, *_) = transcripts.collect(Study(load_runs(run)), reveal_unsafe=True).prompts
    assert first["prompt"] == "row forbidden-0" and first["image"] is None and first["answer"] is None
    response = first["before"]["1"]
    assert response["scores"]["asr/world_exact"] == 1.0 and response["verdict"] == "unsafe" and response["labels"] == {}


def test_no_page_and_no_card_holds_a_text_of_a_row(run):
    shown = pages(configure(run, show_prompts=True))
    assert WORD in shown[0] and "data:image/png" in shown[0], "a page that shows prompts must hold them"
    assert [WORD in page for page in pages(configure(run, show_prompts=False))] == [False] * 4


def test_runs_of_earlier_versions_show_their_prompts(run):
    assert "show_prompts" not in json.loads((run / "config.json").read_text()).get("sweep", {})
    assert WORD in pages(run)[0]


def test_one_seed_that_hides_its_prompts_hides_those_of_the_study(tmp_path):
    folder = tmp_path / "study"
    for seed in (0, 1):
        configure(synthetic.write_run(folder / f"seed_{seed}", seed=seed), show_prompts=seed == 0)
    study = Study(load_runs(folder))
    assert study.has_several_seeds and not transcripts.shows_prompts(study)
