"""The sections with charts over exits show what happened, and little else."""

import json
import re

import pytest

from icet_jax.report.loading import load_runs
from icet_jax.report.page import render_report
from icet_jax.report.sections import differences, measured
from icet_jax.report.study import Study
from tests.report import synthetic
from tests.report.markup import html


def load(run):
    return Study(load_runs(run))


def edit(path, change):
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def test_charts_in_which_nothing_happens_become_one_line(tmp_path):
    run = synthetic.write_run(tmp_path / "run", parts=("difference",))
    section = html(measured.safety_of_study(load(run)))
    assert ">empty</code></figcaption>" not in section and ">truncated</code>" in section
    upper = synthetic.estimate(0.0, 256)["ci95"][1]
    line = "0 at every exit, before and after training: <code>empty</code> "
    assert f'{line}<span class="ci">(intervals up to {100 * upper:.1f}%)</span>.' in section
    edit(run / "sweeps/after.forbidden.json", lambda table: table["layers"][4]["metrics"]["empty"].update(mean=0.1))
    assert line not in html(measured.safety_of_study(load(run)))


def test_differences_of_nothing_become_one_line(tmp_path):
    run = synthetic.write_run(tmp_path / "run", parts=("difference",))
    for layer in range(synthetic.NUM_EXITS):
        edit(
            run / "sweeps/difference.benign.json",
            lambda table, layer=layer: table["layers"][layer]["metrics"].update(
                {"refusal/refusal_keywords": {"mean": 0}}
            ),
        )
    section = html(differences.of_study(load(run)))
    assert "0 at every exit, in the differences: <code>refusal/refusal_keywords</code>." in section
    assert section.count("<figure") == 4


@pytest.mark.parametrize(("prompts", "suffix"), [(20, ", 20 distinct prompts"), (256, "")])
def test_few_distinct_prompts_are_shown(tmp_path, prompts, suffix):
    run = synthetic.write_run(tmp_path / "run", parts=())
    edit(run / "sweeps/before.forbidden.json", lambda table: table.update(prompts=prompts))
    section = html(measured.safety_of_study(load(run)))
    assert f"<h3>Forbidden requests, 256 responses per exit{suffix}</h3>" in section


def test_a_sweep_without_training_has_nothing_after(tmp_path):
    run = synthetic.write_run(tmp_path / "run", after=False)
    page = render_report(load(run), run, reveal_unsafe=False)
    titles = re.findall(r'<th scope="col">([^<]*)', page)
    assert "Before" in titles and not [title for title in titles if "fter" in title]
    assert "<h3>After" not in page and 'class="after"' not in page.split("</style>")[1].split("<script")[0]
