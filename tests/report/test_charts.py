"""Charts put numbers where they belong."""

import re

import pytest

from icet_jax.report.charts.heatmap import step_map
from icet_jax.report.charts.lines import Chart, Point, Series, line_drawing, nice_ticks
from icet_jax.report.charts.svg import svg
from icet_jax.report.curves import single_figure


@pytest.mark.parametrize("low", [-3.7, 0.0, 0.2, 1e-7, 900.0])
@pytest.mark.parametrize("width", [0.0, 1e-18, 1e-6, 0.3, 7.0, 2.5e5])
def test_ticks_cover_the_data_in_round_steps(low, width):
    ticks = nice_ticks(low, low + width)
    assert ticks == sorted(set(ticks))
    assert 2 <= len(ticks) <= 8
    slack = 1e-8 * max(abs(low), width)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + width - slack


def svg_chart(chart):
    return svg(line_drawing(chart, 380, 236))


def circles(markup):
    return [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', markup)]


def test_higher_is_higher_and_later_is_further_right():
    points = [Point(1, 0.0, 0.0, 0.1), Point(2, 1.0, 0.9, 1.0), Point(3, 0.5)]
    chart = Chart(
        "ASR",
        [Series("before", "before", points)],
        show=lambda x: f"{x:.2f}",
        ticks=range(1, 4),
        min_y_range=(0.0, 1.0),
    )
    first, second, third = circles(svg_chart(chart))
    assert first[0] < second[0] < third[0]
    assert second[1] < third[1] < first[1]
    assert third[1] == pytest.approx((first[1] + second[1]) / 2)


def test_tooltips_hold_the_numbers():
    lines = [Series("before", "before", [Point(1, 0.5, 0.4, 0.6)]), Series("", "before", [Point(1, 0.9)], thin=True)]
    markup = svg_chart(Chart("ASR", lines, show=str, highlights={1: "default"}))
    assert "<title>exit 1 (default)\nbefore: 0.5 (0.4 to 0.6)</title>" in markup


def test_share_axes_end_at_their_limits():
    line = Series("", "plain", [Point(1, -0.98), Point(2, 0.01)])
    markup = svg_chart(Chart("d", [line], show=lambda x: f"{x:g}", max_y_range=(-1.0, 1.0), whiskers=True))
    assert ">-1<" in markup
    assert ">-1.5<" not in markup


def test_nothing_to_draw_is_nothing():
    assert single_figure(Chart("x", [], show=str), "y") is None
    assert single_figure(Chart("x", [Series("", "plain", [])], show=str), "y") is None


def test_a_chart_has_a_name_for_those_who_cannot_see_it():
    chart = Chart("<ASR> & more", [Series("", "plain", [Point(1, 0.5)])], show=str)
    assert 'role="img" aria-label="&lt;ASR&gt; &amp; more"' in svg_chart(chart)


def test_heat_map_has_a_cell_per_exit_and_bin():
    drawing, low, high = step_map({(1, 0.0): 1.0, (1, 1.0): 2.0, (2, 1.0): 3.0}, 2, "Scores")
    assert (low, high) == (1.0, 3.0)
    assert svg(drawing).count("<rect") == 3
    assert "exit 2, step 1: 3.00" in svg(drawing)


def paths(markup, style):
    return re.findall(rf'<path class="{style}" d="([^"]*)"', markup)


def test_a_line_does_not_cross_unmeasured_exits():
    points = [Point(x, 0.5, 0.48, 0.52) for x in (1, 2, 3, 6, 7, 10)]
    joined = svg_chart(Chart("ASR", [Series("", "plain", points)], show=str, min_y_range=(0.0, 1.0)))
    split = svg_chart(Chart("ASR", [Series("", "plain", points, gap=1)], show=str, min_y_range=(0.0, 1.0)))
    assert [path.count("L") for path in paths(joined, "stroke")] == [5]
    assert [path.count("L") for path in paths(split, "stroke")] == [2, 1]
    assert len(paths(split, "band")) == 2 and len(paths(split, "error-bar")) == 1, "exit 10 has a bar of its own"
    assert len(circles(split)) == 6


def test_gaps_of_relative_depth_survive_rounding():
    points = [Point(layer / 24, 0.5) for layer in (1, 2, 3, 4, 5, 7, 8)]
    assert [len(piece) for piece in Series("", "plain", points, gap=1 / 24).pieces] == [5, 2]


def test_wide_intervals_are_thin_bars_and_no_block():
    def chart(y, low, high):
        series = [Series(side, side, [Point(x, y, low, high) for x in range(1, 9)]) for side in ("before", "after")]
        return svg_chart(Chart("empty", series, show=str, min_y_range=(0.0, 0.1)))

    for points in ((0.0, 0.0, 0.005), (0.03, 0.02, 0.04)):
        assert len(paths(chart(*points), "band")) == 2 and not paths(chart(*points), "error-bar")
    for points in ((0.0, 0.0, 0.02), (0.1, 0.08, 0.1), (0.05, 0.03, 0.07)):  # a block above zeros, one below ones
        assert not paths(chart(*points), "band")
        bars = paths(chart(*points), "error-bar")
        assert len(bars) == 16 and len(set(bars)) == 16, "bars of both series stand beside each other"
