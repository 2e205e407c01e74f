"""The red box at the top of a page, and the part on the stability of a training."""

import json

import pytest

from icet_jax.report.comparison import load_comparison
from icet_jax.report.loading import load_runs
from icet_jax.report.page import render_comparison, render_report
from icet_jax.report.sections import stability, trust
from icet_jax.report.study import Study
from tests.report import synthetic
from tests.report.markup import html


@pytest.fixture
def run(tmp_path):
    return synthetic.write_run(tmp_path / "run")


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def change_metrics(run, name, edit):
    """Applies `edit(layer, metrics)` to every exit of a sweep file."""
    change(run / f"sweeps/{name}.json", lambda table: [edit(e["layer"], e["metrics"]) for e in table["layers"]])


def doubts(run):
    return trust.doubts(Study(load_runs(run)))


def page(run):
    return render_report(Study(load_runs(run)), run, reveal_unsafe=False)


def test_a_sound_run_has_no_box(run):
    assert doubts(run) == []
    assert '<aside class="alert" ' not in page(run)


def test_few_rows_and_few_prompts(run):
    change(run / "sweeps/after.forbidden.json", lambda table: table.update(prompts=20))
    assert doubts(run) == [
        "forbidden has 20 distinct prompts, fewer than 100: even if no answer at an exit is unsafe, the interval there "
        "goes up to 16.1%."
    ]
    change(run / "sweeps/after.forbidden.json", lambda table: table.update(prompts=256))
    assert doubts(run) == []
    for side in ("before", "after"):
        change(run / f"sweeps/{side}.forbidden.json", lambda table: table.pop("prompts", None))
        change(run / f"sweeps/{side}.forbidden.json", lambda table: [e.update(n=64) for e in table["layers"]])
    assert doubts(run)[0].startswith("forbidden has 64 rows, fewer than 100")


def test_many_unusable_answers(run):
    shares = {1: 0.5, 2: 0.9, 3: 0.2}
    change_metrics(
        run, "after.benign", lambda layer, metrics: metrics["degenerate/text_rules"].update(mean=shares.get(layer, 0.0))
    )
    assert doubts(run) == [
        "benign, after training: at 2 of 8 exits more than 20% of the answers are empty or degenerate (90.0% at exit "
        "2). Verdicts on such answers mean little."
    ]


@pytest.mark.parametrize(("errors", "is_named"), [(5, False), (30, True)])
def test_a_judge_that_failed(run, errors, is_named):
    counts = {"n_error": errors, "n": 256 - errors}
    for side in ("before", "after"):
        change_metrics(run, f"{side}.forbidden", lambda _, metrics: metrics["asr/world_exact"].update(counts))
    named = [line for line in doubts(run) if line.startswith("asr/world_exact gave no verdict on 11.7%")]
    assert bool(named) is is_named


def test_miniatures_are_named(run):
    toys = {"model": {"checkpoint": "toy:llava"}, "sweep": {"datasets": {"forbidden": "file.csv + toy:forbidden"}}}
    change(run / "config.json", lambda config: config.update(toys))
    (line,) = doubts(run)
    assert line.endswith("a real model: model (toy:llava), data (file.csv + toy:forbidden).")


def test_the_box_stands_above_the_headline(run):
    change(run / "sweeps/after.forbidden.json", lambda table: table.update(prompts=20))
    before, box = page(run).split('<aside class="alert" ')
    assert "<h1>" not in before and "<header>" in before and "Do not trust these numbers yet." in box[:100]
    other = synthetic.write_run(run.parent / "other", seed=1)
    compared = render_comparison(load_comparison([run, other]))
    assert "<b>run</b>: forbidden has 20 distinct prompts" in compared and "<b>other</b>: " not in compared


def training(tmp_path, rows):
    run = synthetic.write_run(tmp_path / "run", parts=())
    rows = [{"step": index + 1, "train/updates": 4.0, **row} for index, row in enumerate(rows)]
    synthetic._write_jsonl(run / "metrics.jsonl", rows)
    return html(stability.of_study(Study(load_runs(run))))


def test_guards_that_fired_are_named(tmp_path):
    rows = [{"policy/early_stop": float(index < 3), "train/skipped": float(min(index, 2))} for index in range(10)]
    rows[-1] |= {"train/rollbacks": 1.0, "objective/unscored": 7.0}
    text = training(tmp_path, rows)
    assert "In 3 of 10 recorded iterations <code>config.lppo.target_kl</code>" in text
    assert "2 iterations were skipped: " in text and "went back 1 times" not in text and "went back once" in text
    assert "7 sampled responses got no reward" in text


def test_a_quiet_training_says_so(tmp_path):
    assert "No guard fired in 5 recorded iterations" in training(tmp_path, [{"train/skipped": 0.0}] * 5)


@pytest.mark.parametrize(("last", "words"), [(0.8, "most of the"), (0.2, "a small part"), (-0.4, "no better than")])
def test_the_value_head_is_described(tmp_path, last, words):
    rows = [{"val/explained_variance": -1.0}] * 6 + [{"val/explained_variance": last}] * 2
    text = training(tmp_path, rows)
    assert words in text and "−1.00 to" in text


def test_a_run_without_training_has_no_such_part(tmp_path):
    assert stability.of_study(Study(load_runs(synthetic.write_run(tmp_path / "run", after=False, parts=())))) == []
