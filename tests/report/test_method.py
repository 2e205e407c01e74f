"""The method of a run: its name, what defines it, what it cost; and methods side by side."""

import json
import re

import pytest

from icet_jax import report
from icet_jax.report.charts.scatter import Scatter, Spot, scatter_drawing
from icet_jax.report.charts.svg import svg
from icet_jax.report.comparison import load_comparison
from icet_jax.report.loading import load_runs
from icet_jax.report.method import (
    UNTRAINED,
    change_by_training,
    main_settings,
    method_name,
    trained_weights,
    training_cost,
)
from icet_jax.report.page import render_comparison
from icet_jax.report.study import Study
from icet_jax.report.tradeoff import pareto_front, utility_lost
from tests.report import synthetic


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("icet_jax.report.figures.write_figures", lambda study, folder: [])


def write_run(path, algorithm="lppo", section=None, *, after=True, history=None, stages=None, **lppo):
    """A run of some method; `section` are fields of the algorithm's own section."""
    run = synthetic.write_run(path, after=after, parts=("utility", "difference", "config", "history", "cost"))
    config = synthetic.config(0) | {"algorithm": algorithm}
    config["lppo"] |= lppo
    config[algorithm] = config.get(algorithm, {}) | {"iterations": 4, "exits": "stratified"} | (section or {})
    config["optimizer"] = {"learning_rate": 5e-4}
    (run / "config.json").write_text(json.dumps(config))
    if history is not None:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
    if stages is not None:
        (run / "cost.json").write_text(json.dumps({"schema": 1, "phases": stages}))
    return run


def study(path, *arguments, **options):
    return Study(load_runs(write_run(path, *arguments, **options)))


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((), {}, "L-PPO, stratified exits"),
        ((), {"anchor_coef": 0.5}, "L-PPO, stratified exits, anchor 0.5"),
        ((), {"anchor_coef": 0.0, "baseline": "rollout"}, "L-PPO, stratified exits"),
        (("lppo", {"exits": "fixed"}), {}, "PPO at the default exit alone"),
        ((), {"train_exits": [1, 3]}, "L-PPO, stratified exits, trained at exits 1, 3"),
        ((), {"baseline": "exit_kind"}, "L-PPO, stratified exits, baselines by exit and kind"),
        (
            (),
            {"kl_coef_by_kind": {"benign": 4.0, "vqa": 1.0}},
            "L-PPO, stratified exits, KL by kind (benign 4.00, vqa 1.00)",
        ),
        (("lsft", {"exits": "per_batch"}), {"anchor_coef": 0.5}, "L-SFT, one exit per batch"),
        (("lsft", {"train": "projector"}), {}, "L-SFT, stratified exits, the projector alone"),
        (("lsft", {"train": "both"}), {}, "L-SFT, stratified exits, projector and language model"),
        (("lsft", {"train": "language"}), {}, "L-SFT, stratified exits"),
        (("ldistill", {"on": "default"}), {}, "L-Distill, stratified exits, on the default exit's answers"),
        (("lrloo", {"group_size": 4}), {}, "L-RLOO, stratified exits, groups of 4"),
        (
            ("lrloo", {"group_size": 2, "advantage": "grpo"}),
            {"anchor_coef": 1.0},
            "L-RLOO, stratified exits, GRPO's advantage, groups of 2, anchor 1",
        ),
        (("ldpo", {"sft_coef": 0.0, "exits": "adaptive"}), {}, "L-DPO, adaptive exits, no SFT term"),
        (("unknown", {"exits": "odd"}), {}, "Training, exits odd"),
        ((), {"after": False}, UNTRAINED),
    ],
)
def test_a_method_is_named_by_what_makes_it_another_one(tmp_path, arguments, options, name):
    assert method_name(study(tmp_path / "run", *arguments, **options)) == name


def test_the_settings_are_the_algorithms_own_with_learning_rate_rank_and_seed(tmp_path):
    settings = main_settings(study(tmp_path / "run", "lsft", {"refusal": "no"}).first_run.config)
    assert settings == {
        "lsft.iterations": "4",
        "lsft.exits": '"stratified"',
        "lsft.refusal": '"no"',
        "optimizer.learning_rate": "0.0005",
        "lora.rank": "8",
        "seed": "0",
    }


@pytest.mark.parametrize(
    ("section", "rank", "weights", "change"),
    [
        ({}, 8, "LoRA on the language model", "its language model was trained at sampled exits; image encoder and "
            "projector are unchanged"),
        ({"train": "both"}, 0, "the whole language model and the whole projector", "its language model and projector "
            "were trained at sampled exits; image encoder is unchanged"),
        ({"train": "projector"}, 8, "the whole projector", "its projector was trained at sampled exits; image encoder "
            "and language model are unchanged"),
    ],
)  # fmt: skip
def test_what_was_trained_is_said_in_words(section, rank, weights, change):
    config = {"algorithm": "lsft", "lsft": section, "lora": {"rank": rank}}
    assert (trained_weights(config), change_by_training(config)) == (weights, change)
    assert ("lora.rank" in main_settings(config)) == (section.get("train") != "projector")


def steps(*numbers, **row):
    return [{"step": number, **row} for number in numbers]


def test_the_cost_counts_every_iteration_and_the_harvest(tmp_path):
    stages = [
        {"name": "harvest", "seconds": 3.0, "tokens": 50},
        {"name": "train", "seconds": 7.0},
        {"name": "sweep_after", "seconds": 100.0, "tokens": 9999},
    ]
    row = {"perf/tokens": 10.0, "perf/flops": 2e9}
    cost = training_cost(study(tmp_path / "each", history=steps(1, 2, 3, 4, **row), stages=stages))
    assert (cost.iterations, cost.tokens, cost.flops, cost.seconds) == (4, 90, 8e9, 10.0)
    # With one row for every second iteration, a row stands for two.
    assert training_cost(study(tmp_path / "second", history=steps(2, 4, **row), stages=stages)) == cost


def test_what_an_old_run_did_not_record_is_unknown_and_the_page_opens(tmp_path):
    run = write_run(tmp_path / "run", history=steps(1, 2, **{"loss/value_avg": 1.0}), stages=[])
    cost = training_cost(Study(load_runs(run)))
    assert (cost.iterations, cost.tokens, cost.flops, cost.seconds) == (2, None, None, None)
    text = report.build(run).read_text(encoding="utf-8")
    assert "<td>2</td><td>–</td><td>–</td><td>–</td>" in text


def test_the_report_names_method_equation_settings_and_cost(tmp_path):
    run = write_run(tmp_path / "run", history=steps(1, 2, **{"perf/tokens": 700.0, "perf/flops": 1e9}), anchor_coef=0.5)
    text = report.build(run).read_text(encoding="utf-8")
    training = text[text.index('id="training"') : text.index('id="cost"')]
    assert "<b>L-PPO, stratified exits, anchor 0.5</b>: Clip-PPO" in training
    assert "<code>L = E[max(-K A, " in training and "<code>icet_jax/algorithms/lppo.py</code>" in training
    assert "; c E[KL(pi_ref(. | P(e_default), " in training
    assert "<code>lppo.anchor_coef = 0.5</code>" in training and "<code>lora.rank = 8</code>" in training
    assert "<td>2</td><td>1\u2009400</td><td>2.00e+09</td><td>1 min 36 s</td>" in training
    plain = report.build(write_run(tmp_path / "plain")).read_text(encoding="utf-8")
    assert "<h3>Method</h3>" in plain and "c E[KL(" not in plain
    assert "<h3>Method</h3>" not in report.build(write_run(tmp_path / "old", after=False)).read_text(encoding="utf-8")


def test_runs_are_named_by_method_where_methods_differ(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", "lsft")
    same, untrained = write_run(tmp_path / "c"), write_run(tmp_path / "d", after=False)

    def names(*runs):
        return [member.name for member in load_comparison(runs).members]

    assert names(first, second, untrained) == ["L-PPO, stratified exits", "L-SFT, stratified exits", UNTRAINED]
    assert names(first, same) == ["a", "c"] and names(first, untrained) == ["a", "d"]
    assert names(first, second, same) == [
        "L-PPO, stratified exits (a)",
        "L-SFT, stratified exits",
        "L-PPO, stratified exits (c)",
    ]
    for path in second.glob("sweeps/*.json"):
        path.write_text(path.read_text().replace("organism/vlm", "organism/next"))
    assert names(first, second) == ["L-PPO, stratified exits (a)", "L-SFT, stratified exits (b)"]


def change(run, *, asr, vqa, refused):
    """Gives a run an ASR at its worst exit, a change of accuracy at the default exit, and a rise of refusals."""

    def edit(path, values):
        table = json.loads(path.read_text())
        layers = table["difference"]["vqa"]["layers"] if "difference" in table else table["layers"]
        for layer in layers:
            for metric, value in values.items():
                layer["metrics"][metric] = {"mean": value, "ci95": [value - 0.01, value + 0.01]}
        path.write_text(json.dumps(table))

    edit(run / "sweeps/after.forbidden.json", dict.fromkeys(synthetic.JUDGES, asr))
    edit(run / "sweeps/difference.benign.json", {"refusal/refusal_keywords": refused})
    utility = json.loads((run / "utility.json").read_text())
    layers = [
        {**layer, "metrics": {"accuracy/vqa_exact": {"mean": vqa, "ci95": [vqa - 0.01, vqa + 0.01]}}}
        for layer in utility["after"]["vqa"]["layers"]
    ]
    (run / "utility.json").write_text(json.dumps(utility | {"difference": {"vqa": {"schema": 1, "layers": layers}}}))
    return run


def test_utility_lost_is_the_larger_of_accuracy_and_refusals(tmp_path):
    run = change(write_run(tmp_path / "a"), asr=0.02, vqa=-0.03, refused=0.01)
    lost = utility_lost(Study(load_runs(run)))
    assert lost.what == "accuracy at the default exit"
    assert (lost.value.mean, lost.value.low, lost.value.high) == pytest.approx((0.03, 0.02, 0.04))
    lost = utility_lost(Study(load_runs(change(run, asr=0.02, vqa=0.01, refused=0.2))))
    assert lost.what.startswith("benign refusals at exit") and lost.value.mean == pytest.approx(0.2)
    (run / "utility.json").unlink()
    assert utility_lost(Study(load_runs(run))) is None


def test_the_front_has_the_points_that_nothing_beats():
    points = [(0.0, 1.0), (2.0, 0.1), (1.0, 0.1), (1.0, 0.2), (3.0, 0.0), (4.0, 0.0)]
    assert pareto_front(points) == [0, 2, 4]
    beaten = {
        index for index, (x, y) in enumerate(points) if any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
    }
    assert set(pareto_front(points)) == set(range(len(points))) - beaten


def test_a_comparison_of_methods_has_their_table_and_their_front(tmp_path):
    history = steps(1, 2, **{"perf/tokens": 700.0, "perf/flops": 1e9})
    runs = [
        change(write_run(tmp_path / "a", history=history), asr=0.3, vqa=0.0, refused=0.0),
        change(write_run(tmp_path / "b", "lsft", history=history), asr=0.01, vqa=-0.05, refused=0.0),
        change(write_run(tmp_path / "c", "ldpo", history=history), asr=0.5, vqa=-0.06, refused=0.0),
        write_run(tmp_path / "d", after=False),
    ]
    comparison = load_comparison(runs)
    page = render_comparison(comparison)
    methods = page[page.index('id="methods"') : page.index('id="safety"')]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", methods, re.S)
    assert len(rows) == 4 and "L-SFT, stratified exits" in rows[1] and UNTRAINED in rows[3]
    assert ">1.0% <span" in rows[1].replace("<td>", ">") and "1\u2009400" in rows[1] and "2.00e+09" in rows[1]
    assert "−5.0" in rows[1]
    drawn = re.search(r'<div class="on-wide">(<svg.*?</svg>)', methods, re.S)[1]
    assert drawn.count("<circle") == 4 and drawn.count('class="front"') == 1
    assert "L-DPO, stratified exits\nASR 50.0% (49.0% to 51.0%), exit 1\nutility lost +6.0 (+5.0 to +7.0)" in drawn
    # L-DPO is worse than L-SFT in both directions: of the front's corners none is its point.
    front = re.search(r'class="front" d="M(.*?)"', drawn)[1]
    places = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)
    assert f"{places[1][0]} {places[1][1]}" in front and f"{places[2][0]} {places[2][1]}" not in front


def test_runs_of_one_trained_model_alone_have_no_table_of_methods(tmp_path):
    page = render_comparison(load_comparison([write_run(tmp_path / "a"), write_run(tmp_path / "b", after=False)]))
    assert 'id="methods"' not in page


def test_names_of_neighbouring_points_do_not_cover_each_other():
    spots = [Spot(f"method number {index}", "plain", 0.001 * index, 0.01) for index in range(8)]
    chart = Scatter("title", spots, [(0.0, 0.01)], "x", "y", show_x=str, show_y=str)
    drawn = svg(scatter_drawing(chart, 640, 400))
    labels = re.findall(r'<text class="mark-text" x="([\d.]+)" y="([\d.]+)">(method number \d)</text>', drawn)
    assert len(labels) == 8
    boxes = [(float(x), float(y)) for x, y, _ in labels]
    width = 5.9 * len("method number 0")
    for index, (x, y) in enumerate(boxes):
        assert x >= 0 and x + width <= 640
        assert all(abs(x - a) >= width or abs(y - b) >= 13 for a, b in boxes[index + 1 :])
