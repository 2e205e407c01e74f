"""Several runs in one picture: what they share, where their exits lie, and what the page may not hide."""

import json
import re
from pathlib import Path

import pytest

from icet_jax import report
from icet_jax.errors import UserError
from icet_jax.report.comparison import load_comparison, short_names
from icet_jax.report.page import render_comparison as render
from icet_jax.report.sections.header import sentence
from tests.report import devtools, synthetic, synthetic_compare
from tests.report.synthetic_compare import JUDGE, asr, write_run
from tests.report.test_page import PAYLOAD, Page


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "llava", exits=24, default=23),
        write_run(tmp_path / "llama32v", exits=32, default=32, after=False),
    ]


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch):
    """PNG files take long and are looked at by one test."""
    if request.node.name != "test_the_files":
        monkeypatch.setattr("icet_jax.report.figures.write_comparison_figures", lambda comparison, folder: [])


def figure(page, metric):
    """The large charts of a metric, one per panel."""
    drawn = next(part for part in page.split("<figure")[1:] if f"<code>{metric}</code>" in part)
    return re.findall(r'<div class="on-wide">(<svg.*?</svg>)', drawn, re.S)


def markers(svg, run):
    series = re.search(rf'<g class="series run-{run}">(.*?)</g>', svg, re.S)[1]
    return [float(x) for x in re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="3"/>', series)]


def test_exits_are_placed_by_their_relative_depth(runs):
    before, after = figure(render(load_comparison(runs)), JUDGE)
    llava, llama = markers(before, 0), markers(before, 1)
    assert (len(llava), len(llama)) == (24, 32)
    assert llava[-1] == llama[-1]  # exits 24 of 24 and 32 of 32
    assert llava[11] == llama[15]  # 12 of 24 and 16 of 32
    assert llava[5] == pytest.approx(llama[7], abs=0.11)
    assert llama[0] < llava[0] < llama[1]
    assert 'class="series run-0"' in after and 'class="series run-1"' not in after


def test_a_ring_marks_each_runs_default_exit(runs):
    before, _ = figure(render(load_comparison(runs)), JUDGE)
    rings = re.findall(r'<circle class="ring" cx="([\d.]+)"', before)
    assert [float(x) for x in rings] == [markers(before, 0)[22], markers(before, 1)[31]]


def test_a_tooltip_names_each_runs_nearest_exit(runs):
    before, _ = figure(render(load_comparison(runs)), JUDGE)
    tips = re.findall(r"<title>(.*?)</title>", before, re.S)
    half = next(tip for tip in tips if tip.startswith("depth 50%"))
    share = f"{100 * asr('before', 0.5):.1f}%"
    assert re.search(rf"llava: {share} \(.*\), exit 12 of 24\n", half)
    assert re.search(rf"llama32v: {share} \(.*\), exit 16 of 32$", half)
    assert any(re.search(r"exit 32 of 32, default$", tip) for tip in tips)


def test_every_definition_of_an_exit_is_named(runs, tmp_path):
    page = render(load_comparison([*runs, write_run(tmp_path / "next", exits=24, default=23)]))
    items = re.search(r"What exit l is</h3>\s*<ul>(.*?)</ul>", page, re.S)[1]
    assert f"<li>llava, next: <code>{synthetic_compare.DEFINITIONS[24]}</code></li>" in items
    assert f"<li>llama32v: <code>{synthetic_compare.DEFINITIONS[32]}</code></li>" in items


def test_the_headline_spans_the_runs_worst_exits(runs, tmp_path):
    comparison = load_comparison(runs)
    assert sentence(comparison) == (
        "2 runs side by side: before training the worst exit is 92.9% unsafe, after training the worst exit is "
        "2.0% unsafe."
    )
    late = write_run(tmp_path / "late", exits=24, default=23, layers=(12, 23))
    assert f"is between {100 * asr('before', 0.5):.1f}% and 92.9% unsafe" in sentence(load_comparison([*runs, late]))


def test_any_exit_stands_beside_the_worst_exit(runs):
    """In the headline, the table of runs and the numbers; a run of an earlier version has none."""
    path = runs[0] / "sweeps/after.forbidden.json"
    after = path.read_text()
    estimate = {"mean": 0.4, "ci95": [0.3, 0.5], "n": 100, "n_error": 0}
    path.write_text(json.dumps(json.loads(after) | {"any_exit": {JUDGE.replace("asr", "asr_any"): estimate}}))
    page = render(load_comparison(runs))
    path.write_text(after)
    assert "after training the worst exit is 2.0% unsafe (40.0% of the prompts at one exit or another)." in page
    table = re.search(r"<span>The runs</span></caption>.*?</table>", page, re.S)[0]
    cells = re.findall(r"<tr>.*?</tr>", table, re.S)
    assert '<th scope="col">Any exit</th>' in cells[0]
    assert re.search(r"40\.0% <span[^>]*>\(30\.0% to 50\.0%\)", cells[1]) and "40.0%" not in cells[2]
    numbers = page[page.index('id="numbers"') :]
    assert numbers.count("Worst exit") >= 2 and numbers.count("Any exit") == 1


def test_empty_and_degenerate_answers_of_the_worst_exits_are_named(runs, tmp_path):
    assert "empty or degenerate" not in render(load_comparison(runs))
    path = runs[0] / "sweeps/before.forbidden.json"
    before = path.read_text()
    table = json.loads(before)
    for layer in table["layers"]:
        layer["metrics"]["degenerate/text_rules"] = {"mean": 0.25}
    path.write_text(json.dumps(table))
    page = render(load_comparison(runs))
    path.write_text(before)
    assert "Some answers of the worst exits are empty or degenerate (llava, before training, exit 1: 25.0%)." in page


def test_only_what_two_runs_measured_is_drawn(tmp_path):
    first = write_run(tmp_path / "a", exits=8, default=7, more=("asr/llama_guard", "ts/one"))
    second = write_run(tmp_path / "b", exits=8, default=7, datasets=("forbidden",), more=("ts/two",))
    third = write_run(tmp_path / "c", exits=6, default=6, datasets=("forbidden",), more=("asr/llama_guard",))
    comparison = load_comparison([first, second, third])
    assert comparison.datasets == ["sweep/forbidden"]
    # Keyword judges stand after those that read what an answer says.
    assert comparison.metrics("sweep/forbidden")[:2] == ["asr/llama_guard", JUDGE]
    assert [m.name for _, m in comparison.members_with("sweep/forbidden", "asr/llama_guard")] == ["a", "c"]
    page = render(comparison)
    held = re.search(r"<code>asr/llama_guard</code><span class=\"legend\">(.*?)</figcaption>", page)[1]
    assert ">a<" in held and ">c<" in held and ">b<" not in held
    limits = page[page.index('id="limits"') :]
    assert "<code>ts/one</code> on forbidden (a)" in limits and "on benign (a)" in limits
    assert "<figcaption><b>Toxicity" not in page


def test_runs_that_perspective_judged_are_compared_and_reported(tmp_path):
    names = ("ts/perspective", "ts/perspective.insult")
    runs = [write_run(tmp_path / name, exits=8, default=7, more=names) for name in ("a", "b")]
    for run in runs:
        values = json.loads((run / "config.json").read_text())
        values["scorers"] = {"perspective": {"kind": "perspective", "attributes": ["TOXICITY", "INSULT"]}}
        (run / "config.json").write_text(json.dumps(values))
    assert set(names) <= set(load_comparison(runs).metrics("sweep/forbidden"))
    assert "ts/perspective" in render(load_comparison(runs))
    assert "ts/perspective" in report.build(runs[0]).read_text(encoding="utf-8")


def test_what_else_differs_is_said_at_the_top(tmp_path):
    first = write_run(tmp_path / "a", exits=8, default=7, source="toy:forbidden", rows=100)
    second = write_run(tmp_path / "b", exits=8, default=7, source="mine.csv", rows=40)
    page = render(load_comparison([first, second]))
    header = page[page.index("<header") : page.index("</header>")]
    assert "forbidden and benign are not the same sets in all runs (a: toy:forbidden; b: mine.csv)." in header
    assert "different numbers of rows of forbidden and benign at each exit (a: 100; b: 40)." in header
    same = render(load_comparison([first, write_run(tmp_path / "c", exits=8, default=7, source="toy:forbidden")]))
    assert "caveat" not in same[same.index("<header") : same.index("</header>")]


def test_another_number_of_attempts_is_another_way_of_generating(runs):
    path = runs[1] / "sweeps/before.forbidden.json"
    for attempts, differs in ((1, False), (5, True)):
        table = json.loads(path.read_text())
        table["generation"]["attempts"] = attempts
        path.write_text(json.dumps(table))
        (runs[1] / "sweeps/before.benign.json").unlink(missing_ok=True)
        assert bool(load_comparison(runs).differing_generation()) is differs


def test_a_planted_hole_is_no_evidence(runs, tmp_path):
    organism = synthetic.write_run(tmp_path / "organism")
    page = render(load_comparison([*runs, organism]))
    assert "L-PPO, stratified exits (organism): a small model trained here" in page
    assert "no evidence that the hole emerges" in page
    assert synthetic.UNSAFE_TEXT not in page


def test_runs_of_several_seeds_count_as_one(runs, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "seeds" / f"seed_{seed}", exits=8, default=7)
    page = render(load_comparison([runs[0], tmp_path / "seeds"]))
    assert "L-PPO, one exit per row, 2 seeds" in page and "range over 2 seeds" in page


def test_groups_are_each_runs_own_thirds(runs):
    page = render(load_comparison(runs))
    table = re.search(rf"<caption><span>Attack success rate: {JUDGE} on forbidden.*?</table>", page, re.S)[0]
    early = sum(asr("before", layer / 24) for layer in range(1, 9)) / 8
    row = re.search(r"llava</span></th><td>(.*?)</td>", table)[1]
    assert row.startswith(f'<span class="before">{100 * early:.1f}%</span>') and "2.0%" in row
    assert "→" not in re.search(r"llama32v</span></th><td>(.*?)</td>", table)[1]


def test_every_file_but_the_sweeps_may_be_missing(runs):
    for run in runs:
        (run / "geometry.json").unlink()
        (run / "config.json").unlink()
    page = render(load_comparison(runs))
    assert 'id="safety"' in page and 'id="geometry"' not in page


def test_the_page_is_whole_alone_and_safe(tmp_path):
    runs = [write_run(tmp_path / name, exits=8, default=7) for name in ("a", "b")]
    for path in runs[0].glob("sweeps/*.json"):
        table = json.loads(path.read_text())
        table |= {"model": PAYLOAD, "exit_definition": PAYLOAD}
        table["layers"][0]["metrics"][f"asr/{PAYLOAD}"] = {"mean": 0.5}
        path.write_text(json.dumps(table))
    text = render(load_comparison(runs))
    page = Page(text)
    assert [name for name in page.ids if name not in ("tip", "chart-data")] == [
        *("runs", "methods", "safety", "utility", "groups", "geometry", "numbers", "limits")
    ]
    assert PAYLOAD not in text and "\u202e" not in text and "onerror=alert" not in text.replace("src=x onerror", "")
    assert all(not name.startswith("on") for name, _ in page.attributes)


def test_the_files(runs, tmp_path):
    page = report.compare_runs(runs, tmp_path / "out")
    assert page == tmp_path / "out" / "compare.html" and page.is_file()
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"forbidden.asr_refusal_keywords.png", "benign.refusal_refusal_keywords.png"} <= set(pictures)
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "needs two or more run directories"),
        (["a"], "needs two or more run directories"),
        (["a", "a"], "given twice"),
        (["a", "nowhere"], "nowhere: no such run directory"),
        (["a", "empty"], "holds no before*.json or after*.json"),
        (["a", "other"], "a has forbidden, benign; other has jokes"),
        (["a"] * 9, "at most 8 runs"),
    ],
)
def test_what_cannot_be_compared_is_one_line(names, says, tmp_path):
    write_run(tmp_path / "a", exits=8, default=7)
    write_run(tmp_path / "other", exits=8, default=7, datasets=("jokes",))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        load_comparison([tmp_path / name for name in names])
    assert "\n" not in str(caught.value)


def test_names_are_the_shortest_that_differ():
    paths = [Path("/x/one/run"), Path("/x/two/run"), Path("/x/other")]
    assert short_names(paths) == ["one/run", "two/run", "other"]


@pytest.mark.skipif(devtools.find_browser() is None, reason="no Chromium is installed")
def test_the_browser_draws_it(runs, tmp_path):
    url = report.compare_runs(runs, tmp_path / "out").as_uri()
    with devtools.browser(tmp_path / "profile") as page:
        for width, columns in ((1400, 2), (420, 1)):
            page.open(url, width=width)
            panels = "getComputedStyle(document.querySelector('.panels.n2')).gridTemplateColumns.split(' ').length"
            assert page.evaluate(panels) == columns
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.open(url)
        strokes = "new Set([...document.querySelectorAll('figure .stroke')].map(e => getComputedStyle(e).stroke)).size"
        assert page.evaluate(strokes) == 2
        page.click(".on-wide .hits rect:nth-child(20)")
        assert page.evaluate("document.getElementById('tip').textContent").startswith("depth ")
        over = "new PointerEvent('pointerover', {bubbles: true})"
        page.evaluate(f"document.querySelector('.on-wide .hits rect:nth-child(30)').dispatchEvent({over})")
        assert page.evaluate("document.querySelectorAll('.hits rect.on').length") > 1  # the same depth in all charts
        assert page.problems == []
        assert [url for url in page.requests if not url.startswith(("file:", "data:", "about:"))] == []
