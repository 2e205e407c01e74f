"""The numbers behind the charts of a page, which a reader can download."""

import re

import pytest

from icet_jax.report.charts.data import figure_data
from icet_jax.report.charts.figures import DataTable, Figure, Panel
from icet_jax.report.charts.lines import Chart, Point, Series
from icet_jax.report.charts.marks import Drawing
from icet_jax.report.charts.scatter import Scatter, Spot
from icet_jax.report.comparison import load_comparison
from icet_jax.report.loading import load_runs
from icet_jax.report.page import render_comparison, render_report
from icet_jax.report.study import Study
from tests.report import synthetic
from tests.report.markup import chart_data


def table(chart, **panel):
    (content,) = figure_data(Figure("Title", "metric", (Panel(chart, **panel),), source="set"))["panels"]
    return content["columns"], content["rows"]


def test_a_line_chart_has_a_row_per_point():
    series = [
        Series("", "before", [Point(1, 0.1)], thin=True),
        Series("", "before", [Point(1, 0.3)], thin=True),
        Series("before", "before", [Point(1, 0.2, 0.1, 1 / 3), Point(4, 0.5)]),
    ]
    assert table(Chart("ASR", series, show=str)) == (
        ["series", "exit", "value", "low", "high"],
        [
            ["before, seed 1", 1, 0.1, None, None],
            ["before, seed 2", 1, 0.3, None, None],
            ["before", 1, 0.2, 0.1, 0.3333333],
            ["before", 4, 0.5, None, None],
        ],
    )


def test_other_charts_have_their_numbers_too():
    spots = [Spot("L-PPO", "run-0", 0.1, 0.2, x_range=(0.0, 0.3))]
    scatter = Scatter("t", spots, [], "utility lost", "ASR", show_x=str, show_y=str)
    columns, rows = table(scatter)
    assert columns == ["name", "utility lost", "low", "high", "ASR", "low", "high"]
    assert rows == [["L-PPO", 0.1, 0.0, 0.3, 0.2, None, None]]
    data = DataTable(("exit", "share"), [(1, 0.5)])
    assert table(Drawing(1, 1, "t", []), data=data) == (["exit", "share"], [[1, 0.5]])


@pytest.mark.parametrize("is_comparison", [False, True])
def test_every_figure_of_a_page_has_its_numbers_in_the_same_order(tmp_path, is_comparison):
    run = synthetic.write_run(tmp_path / "a")
    if is_comparison:
        page = render_comparison(load_comparison([run, synthetic.write_run(tmp_path / "b", seed=1)]))
    else:
        page = render_report(Study(load_runs(run)), run, reveal_unsafe=False)
    figures = chart_data(page)["figures"]
    captions = re.findall(r"<figcaption><b>([^<]*)</b><code>([^<]*)</code>", page)
    assert captions == [(figure["title"], figure["metric"]) for figure in figures] and len(figures) > 5
    assert all(panel["rows"] for figure in figures for panel in figure["panels"])
    assert all(len(row) == len(p["columns"]) for figure in figures for p in figure["panels"] for row in p["rows"])


def test_numbers_are_those_of_the_sweep(tmp_path):
    run = synthetic.write_run(tmp_path / "run", parts=())
    study = Study(load_runs(run))
    (panel,) = chart_data(render_report(study, run, reveal_unsafe=False))["figures"][0]["panels"]
    for series, layer, *numbers in panel["rows"]:
        value = study.value(series, "sweep/forbidden", "asr/world_exact", layer)
        assert numbers == pytest.approx([value.mean, value.low, value.high], rel=1e-6)
    assert len(panel["rows"]) == 2 * synthetic.NUM_EXITS
