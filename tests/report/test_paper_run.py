"""The sections of an experiment like the paper's: its Table 2, heat maps by policy, judges and their agreement."""

import dataclasses
import json
import re

import pytest

from icet_jax import report
from icet_jax.errors import UserError
from icet_jax.report.charts.svg import svg
from icet_jax.report.curves import metric_figure, ordered_categories
from icet_jax.report.loading import load_run, load_runs
from icet_jax.report.paper import TABLE_2, paper_references, papers_name
from icet_jax.report.sections import categories, judges, paper
from icet_jax.report.study import Study
from icet_jax.report.verdict import make_headline
from tests.report import synthetic, synthetic_paper
from tests.report.markup import html as markup
from tests.report.test_page import PAYLOAD, Page


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic_paper.write_paper_run(tmp_path_factory.mktemp("paper") / "run")


@pytest.fixture
def study(run):
    return Study(load_runs(run))


def paper_html(study):
    return markup(paper.of_study(study))


def judges_html(study):
    return markup(judges.of_study(study))


def categories_html(study):
    return markup(categories.of_study(study))


def rows_of(html, caption):
    """A table's body as rows of texts."""
    part = html.split(f"<caption><span>{caption}</span></caption>")[1].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", part)[1:]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows]


@pytest.mark.parametrize("name", TABLE_2)
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("side", range(2))
def test_the_papers_averages_are_the_means_of_its_groups(name, place, side):
    groups = [TABLE_2[name][group][place][side] for group in ("early", "middle", "late")]
    rounding = (1e-4, 1e-4, 1e-2)[place]  # the paper prints two decimals, of percent for shares
    assert sum(groups) / 3 == pytest.approx(TABLE_2[name]["average"][place][side], abs=1.01 * rounding)


def test_the_papers_numbers_stand_beside_ours(study):
    html = paper_html(study)
    rows = rows_of(html, "miniJailBreakV-28K, and mini here")
    assert [row[0] for row in rows] == ["Early exits 1–8", "Middle exits 9–16", "Late exits 17–24", "Average"]
    assert rows[3][1] == "50.58% → 10.50%" and rows[3][4] == "7.92% → 5.19%" and rows[3][6] == "−0.34 → 0.31"
    ours = [
        study.group(phase, "sweep/mini", synthetic_paper.JUDGES[0], "average").mean for phase in ("before", "after")
    ]
    assert rows[3][2] == " → ".join(f"{100 * value:.1f}%" for value in ours)
    order = [html.index(name) for name in TABLE_2]
    assert order == sorted(order)
    assert "xstest" not in html and "asr/human" not in html
    assert "miniJailBreakV-28K has 280 rows in the paper, 12 were answered here." in html
    assert "The paper trained on" not in html


def test_another_training_set_and_missing_exits_are_said(run, tmp_path):
    copy = synthetic_paper.write_paper_run(tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["data"]["train"] = "mine.csv"
    (copy / "config.json").write_text(json.dumps(config))
    for path in copy.glob("sweeps/*.mini.json"):
        table = json.loads(path.read_text())
        table["layers"], table["groups"] = table["layers"][:10], {}
        path.write_text(json.dumps(table))
    html = paper_html(Study(load_runs(copy)))
    assert "The paper trained on RedTeam-2K, this run on <code>mine.csv</code>." in html
    assert "Not every exit was measured on mini" in html
    assert rows_of(html, "miniJailBreakV-28K, and mini here")[1][2] == "–"


@pytest.mark.parametrize(
    ("checkpoint", "shown"),
    [
        ("llava-hf/llava-1.5-7b-hf", True),
        ("/models/llava-v1.5-7b/", True),
        ("llava-hf/llava-1.5-13b-hf", False),
        ("toy:llava15", False),
    ],
)
def test_the_table_needs_the_papers_model(tmp_path, checkpoint, shown):
    run = synthetic_paper.write_paper_run(tmp_path / "run", after=False, checkpoint=checkpoint)
    assert bool(paper_html(Study(load_runs(run)))) is shown


@pytest.mark.parametrize(
    ("name", "source", "wanted"),
    [
        ("x", "jailbreakv_28k:C/mini_JailBreakV_28K.csv", "miniJailBreakV-28K"),
        ("x", "jailbreakv_28k:mini/JailBreakV_28K.csv", None),
        ("x", "advbench_coco:harmful_behaviors.csv?images=coco&seed=1", "AdvBench-COCO"),
        ("my_custom_set", "rows.jsonl", "Custom Prompts"),
        ("x", "rows.jsonl", None),
        ("custom", "toy:custom", None),
        ("x", 3, None),
    ],
)
def test_sets_are_known_by_their_source(study, monkeypatch, name, source, wanted):
    monkeypatch.setitem(study.first_run.config, "sweep", {"datasets": {name: source}})
    assert papers_name(study, f"sweep/{name}") == wanted
    assert papers_name(study, f"utility/{name}") is None


def test_policies_are_drawn_exit_by_exit(study):
    html = categories_html(study)
    svg = html.split("<svg")[1].split("</svg>")[0]
    assert svg.count("<rect") == 2 * 24 * len(synthetic_paper.POLICIES)
    assert ">Government Decision-Making, Elect…</text>" in svg
    value = dict(study.category_curve("before", "sweep/advbench", synthetic_paper.JUDGES[0], "Fraud"))[5]
    assert f"before, exit 5: {100 * value.mean:.0f}" in svg and f"\nFraud\n{value.n} rows, " in svg
    assert value.n + value.n_error == 4
    assert html.count("The same by other scorers") == len(synthetic_paper.SOURCES)
    assert html.count('class="cells refused"') == html.count('class="cells safe"') == 1
    first = ordered_categories(study, "sweep/mini", synthetic_paper.JUDGES[0])
    means = [study.category_curve("before", "sweep/mini", synthetic_paper.JUDGES[0], policy) for policy in first]
    means = [sum(value.mean for _, value in curve) for curve in means]
    assert means == sorted(means, reverse=True) and len(set(means)) == 3


def test_a_sweep_without_policies_has_no_map(tmp_path):
    assert categories_html(Study(load_runs(synthetic.write_run(tmp_path / "run")))) == ""


@pytest.mark.parametrize("policies", [{"a": 3}, {"a": [{"layer": "1", "metrics": {}}]}])
def test_broken_policies_are_named(tmp_path, policies):
    run = synthetic.write_run(tmp_path / "run", parts=())
    path = run / "sweeps/before.benign.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"policies": policies}))
    with pytest.raises(UserError, match="policies"):
        load_run(run)


def test_errors_are_visible_judge_by_judge(study):
    rows = {row[0]: row[1:] for row in rows_of(judges_html(study), "Over all data sets and exits, before → after")}
    scored, failed = rows["asr/llama_guard_3_8b"]
    before = [int(part.split(" → ")[0].replace("\u2009", "")) for part in (scored, failed)]
    assert sum(before) == 24 * (3 * 12 + 6) and before[1] > 0
    assert "xstest" in failed and "custom" in failed
    assert rows["asr/refusal_keywords"] == ["1\u2009008 → 1\u2009008", "0"]
    assert not {"length", "vqa/official", "degenerate/text_rules"} & set(rows)


def test_agreement_is_a_table_with_the_rows_that_differ(study):
    html = judges_html(study)
    pairs = {row[0]: row[1:] for row in rows_of(html, "Agreement between judges of attacks")}
    first = study.first_run.agreement["pairs"][0]
    row = pairs["asr/llama_guard_3_8b and asr/refusal_keywords"]
    assert row[0].startswith(f"{first['kappa']:.3f} (") and row[2:4] == ["0", str(first["b_only"])]
    assert pairs["asr/refusal_keywords and asr/human"][:2] == ["1.00", "100%"]
    example = first["examples"][0]
    assert rows_of(html, "12 of them; agreement.json names more")[0][:3] == [
        example["dataset"],
        example["id"],
        str(example["layer"]),
    ]


@pytest.mark.parametrize(
    ("content", "rows"), [({}, 0), ({"pairs": 3}, 0), ({"pairs": [3, {"a": "x"}, {"a": "x", "b": "y"}]}, 1)]
)
def test_agreement_may_be_missing_or_odd(run, content, rows):
    first = dataclasses.replace(load_run(run), agreement=content)
    html = judges_html(Study((first,)))
    assert html.count('x</code> <span class="ci">and</span>') == rows
    assert ("Do they agree?" in html) is bool(rows)


def test_people_do_not_decide_the_headline(study):
    assert "asr/human" in study.metrics("sweep/mini", "asr") and "asr/human" not in study.judges("sweep/mini")
    assert "human" not in " ".join([make_headline(study).sentence, *make_headline(study).caveats])


def test_refusals_and_vqa_are_in_the_utility_section(run, monkeypatch):
    monkeypatch.setattr("icet_jax.report.figures.write_figures", lambda study, folder: [])
    text = report.build(run).read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)">', text)
    assert sections[:4] == ["safety", "categories", "groups", "paper"] and "judges" in sections
    part = text.split('<section id="utility">')[1].split("</section>")[0]
    table = {row[0] for row in rows_of(part, "At the default exit 23 (95% interval, clustered by prompt)")}
    assert "<b>Refusals of safe requests</b>" in part
    assert {"xstest refusal/refusal_keywords", "xstest refusal_unsafe/refusal_keywords", "vqa_v2 vqa/official"} <= table
    assert "vqa_v2 vqa/official_yes_no" in table and "vqa_v2 tr/general" in table
    assert "xstest asr/llama_guard_3_8b" not in table
    assert "compares letter by letter" in text and "what people said of a sample" in text


def test_no_text_of_these_files_becomes_markup(tmp_path, monkeypatch):
    monkeypatch.setattr("icet_jax.report.figures.write_figures", lambda study, folder: [])
    run = synthetic_paper.write_paper_run(tmp_path / "run")
    for path in [*run.glob("*/*.advbench.json*"), *run.glob("*/*.custom.json*")]:
        path.unlink()
    plain = Page(report.build(run).read_text(encoding="utf-8")).tags
    for path in [*run.glob("*.json"), *run.glob("sweeps/*.json"), *run.glob("transcripts/*.jsonl")]:
        text = path.read_text()
        for word in ("Fraud", "llama_guard_3_8b", "homonyms", "mini-", "toxic_bert"):
            text = text.replace(word, word + json.dumps(PAYLOAD)[1:-1])
        path.write_text(text)
    text = report.build(run).read_text(encoding="utf-8")
    assert Page(text).tags == plain and "<img src=x" not in text


def test_seeds_are_averaged_in_maps_and_judges(tmp_path):
    for seed in range(2):
        synthetic_paper.write_paper_run(tmp_path / f"run/seed_{seed}")
    study = Study(load_runs(tmp_path / "run"))
    one = Study(load_runs(tmp_path / "run/seed_0"))
    metric = synthetic_paper.JUDGES[1]
    curves = [dict(s.category_curve("after", "sweep/mini", metric, "Fraud")) for s in (study, one)]
    assert {exit_: value.mean for exit_, value in curves[0].items()} == pytest.approx(
        {exit_: value.mean for exit_, value in curves[1].items()}
    )
    rows = {row[0]: row[1] for row in rows_of(judges_html(study), "Over all data sets and exits, before → after")}
    assert rows[metric] == "2\u2009016 → 2\u2009016"
    assert paper.NAMES["asr"] in paper_html(study)


def test_the_papers_means_are_marks_in_the_charts(study):
    figure = metric_figure(study, "sweep/mini", synthetic_paper.JUDGES[0], wide=True)
    marks = figure.panels[0].chart.references
    values = {(mark.tone, mark.first, mark.last): mark.y for mark in marks}
    assert values == {
        ("before", 1, 8): 0.5379, ("after", 1, 8): 0.1840, ("before", 9, 16): 0.4933, ("after", 9, 16): 0.0957,
        ("before", 17, 24): 0.4862, ("after", 17, 24): 0.0353,
    }  # fmt: skip
    assert figure.keys[-1].label == "paper’s Table 2"
    drawn = svg(figure.wide_drawing(figure.panels[0]))
    assert drawn.count('class="reference"') == 6 and "paper, after: 3.5% (mean of exits 17 to 24)" in drawn
    assert metric_figure(study, "sweep/mini", "ts/toxic_bert").panels[0].chart.references[0].y == 0.0903


def test_marks_need_the_papers_set_model_and_kind_of_metric(study, tmp_path):
    assert not paper_references(study, "sweep/xstest", synthetic_paper.JUDGES[0])
    assert not paper_references(study, "sweep/mini", "asr/refusal_keywords")
    assert not paper_references(study, "sweep/mini", "truncated")
    run = study.first_run
    model = {**run.config, "model": {"checkpoint": "llava-hf/llava-1.5-13b-hf"}}
    tables = {key: {**table, "model": "llava-1.5-13b-hf"} for key, table in run.tables.items()}
    other = Study((dataclasses.replace(run, config=model, tables=tables),))
    assert not paper_references(other, "sweep/mini", synthetic_paper.JUDGES[0])


def test_a_sweep_without_training_has_the_papers_original_alone(study):
    run = study.first_run
    tables = {key: table for key, table in run.tables.items() if key[0] == "before"}
    before = Study((dataclasses.replace(run, tables=tables),))
    tones = [mark.tone for mark in paper_references(before, "sweep/mini", synthetic_paper.JUDGES[0])]
    assert tones == ["before"] * 3
