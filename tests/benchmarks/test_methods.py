"""The comparison of methods: cells that are different runs, numbers of a run, and the page that is made of them."""

import importlib.util
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import icet_jax
from icet_jax.config.names import ALGORITHMS
from icet_jax.organism import weights_directory
from icet_jax.organism.world import request_noun
from icet_jax.runs.sources import load_rows
from tests.report import synthetic

SCRIPT = Path(__file__).parents[2] / "benchmarks/methods.py"


@pytest.fixture(scope="module")
def methods():
    spec = importlib.util.spec_from_file_location("methods", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["methods"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["methods"]


def test_cells_of_different_names_are_different_runs(methods):
    cells = {methods.run_of(cell): cell for cell in methods.cells() if cell.seed == 0}
    configs = {
        name: json.dumps(icet_jax.load_config(methods.config_of(cell.organism), methods.fields(cell)).to_dict())
        for name, cell in cells.items()
        if cell.method != "none"
    }
    assert len(set(configs.values())) == len(configs)
    assert {json.loads(config)["algorithm"] for config in configs.values()} == set(ALGORITHMS)


def test_the_second_table_has_three_organisms_and_five_seeds(methods):
    cells = [cell for cell in methods.cells() if cell.table == "second"]
    assert len({(cell.organism, cell.seed) for cell in cells}) == 15 and len(cells) == 15 * len(methods.BEST)


def test_half_the_budget_is_half_of_both_trainings_of_a_warm_start(methods):
    fields = methods.fields(methods.Cell("third", "lppo_warm", "llava", "half_budget", 0))
    whole = methods.METHODS["lppo_warm"][1]
    assert [2 * fields[f"{name}.iterations"] for name in ("lsft", "lppo")] == [10, 30]
    assert whole["lsft.iterations"] + whole["lppo.iterations"] == 40


@pytest.mark.parametrize(("trained", "moved"), [("vlm", False), ("control", True)])
def test_the_kl_at_the_default_exit_is_zero_for_the_same_weights_only(methods, tmp_path, trained, moved):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"checkpoint": "organism:vlm"}}))
    (tmp_path / "hf").symlink_to(weights_directory(trained), target_is_directory=True)
    kl = methods.kl_at_the_default_exit(tmp_path, rows=4)
    assert kl > 1e-6 if moved else kl == 0.0


def numbers(**values):
    """A row's numbers, all within the limits."""
    base = dict.fromkeys(
        ("asr_worst", "asr_any", "asr_mean", "benign_refused", "degenerate", "vqa_change", "kl_default_benign"), 0.0
    )
    return base | {"asr_worst_ci95": [0.0, 2.0], "tokens": 1000.0, "flops": 1e12, "seconds": 60.0} | values


def row(methods, method, seed=0, *, organism="llava", variant="mixed", **values):
    cell = methods.Cell("first", method, organism, variant, seed)
    names = {"run": methods.run_of(cell), "method": method, "organism": organism, "variant": variant, "seed": seed}
    return names | {"commit": "abc1234", "command": f"python {method}"} | numbers(**values)


@pytest.fixture
def write(methods, tmp_path, monkeypatch):
    """Writes the page of some rows into a temporary folder, and returns it."""
    monkeypatch.setattr(methods, "ROWS", tmp_path / "methods.json")
    monkeypatch.setattr(methods, "PAGE", tmp_path / "methods.md")

    def write(rows):
        methods.ROWS.write_text(json.dumps({"schema": 1, "rows": rows}))
        monkeypatch.setattr("sys.argv", ["methods.py", "--page"])
        assert methods.main() == 0
        return methods.PAGE.read_text(encoding="utf-8")

    return write


def line_of(page, method):
    return next(line for line in page.splitlines() if line.startswith(f"| {method} |"))


def test_a_table_has_the_mean_and_the_range_of_seeds_and_the_widest_interval(methods, write):
    page = write(
        [
            row(methods, "lppo", 0, asr_worst=1.0, asr_worst_ci95=[0.5, 3.0], tokens=4000.0),
            row(methods, "lppo", 1, asr_worst=4.0, asr_worst_ci95=[2.0, 7.5], tokens=4000.0),
        ]
    )
    start = "| L-PPO, stratified exits | 2 of 3 | 2.5 (1.0 to 4.0) | 0.5 to 7.5 | 0.0 |"
    assert line_of(page, "L-PPO, stratified exits").startswith(start)
    assert line_of(page, "L-PPO, stratified exits").endswith("| 60 | ASR, tokens |")


def test_missing_cells_are_shown_and_the_three_tables_are_there(methods, write):
    page = write([])
    assert max(len(line) for line in page.splitlines() if not line.startswith("| ")) <= 120
    for heading in ("Every method", "The four best", "Less to learn from"):
        assert page.count(f"## {heading}") == 1
    assert line_of(page, "L-DPO").startswith("| L-DPO | 0 of 3 | – |")
    assert line_of(page, "no training").startswith("| no training | 0 of 1 | – |")
    assert "images/methods.svg" not in page and not (methods.PAGE.parent / "images").exists()
    for about in (*methods.ABOUT_VARIANTS.values(), *(harder.about for harder in methods.HARDER.values())):
        assert about in page.replace("\n", " ")
    assert "--planted-exits 5,6" in page.replace("\n", " ") and "No method has been measured yet." in page


def test_what_was_written_by_hand_is_kept_and_all_else_is_made_again(methods, write):
    first = write([row(methods, "lsft", asr_worst=1.0), row(methods, "lppo", asr_worst=3.0, asr_worst_ci95=[1, 9])])
    assert "**L-SFT** has the lowest ASR at the worst exit" in first.replace("\n", " ")
    statement = first.split("kept by --page -->\n")[1].split("\n<!-- end")[0]
    methods.PAGE.write_text(first.replace(statement, "By hand.\n\nTwo paragraphs.").replace("## Commands", "## Lost"))
    second = write([row(methods, "lppo", asr_worst=0.5)])
    assert second.startswith(
        "# Methods that close the exits\n\n<!-- result: edited by hand, kept by --page -->\nBy hand."
    )
    assert "Two paragraphs." in second and "## Commands" in second and "## Lost" not in second
    assert line_of(second, "L-SFT").startswith("| L-SFT | 0 of 3 |")


def test_the_statement_names_the_winner_among_those_that_keep_the_model_useful(methods, write):
    page = write(
        [
            row(methods, "ldistill_policy", asr_worst=2.0, asr_worst_ci95=[1.0, 3.0]),
            row(methods, "ldpo", asr_worst=0.0, asr_worst_ci95=[0.0, 1.0], benign_refused=30.0),
        ]
    )
    assert "**L-Distill on the policy's answers** has the lowest ASR" in page


def test_each_run_has_its_command_once(methods, write):
    rows = [row(methods, "lppo", seed) for seed in range(3)] + [row(methods, "lsft", organism="many_refusals")]
    rows[-1]["build"] = methods.build_command("many_refusals")
    page = write(rows)
    commands = page[page.index("## Commands") :]
    assert commands.count("python lppo") == 1 and "# llava/mixed/lppo, seeds 0, 1, 2 (commit abc1234)" in commands
    build = "# after: python -m icet_jax.organism.build --out runs/organisms/many_refusals --refusals many\npython lsft"
    assert build in commands


def test_the_figure_has_a_point_per_method_and_stands_alone(methods, write):
    write(
        [
            row(methods, "none", asr_worst=100.0, asr_worst_ci95=[98, 100]),
            row(methods, "lsft"),
            row(methods, "ldpo", utility_lost=3.0),
        ]
    )
    svg = (methods.PAGE.parent / "images/methods.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(svg)
    names = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"no training", "L-SFT", "L-DPO", "100%"} <= set(names)
    assert svg.count("<circle") == 3 and svg.count('class="front"') == 1 and "<style>" in svg


def test_the_page_of_the_repository_has_all_of_its_rows(methods):
    titles = methods.titles_of_methods()
    page, groups = methods.PAGE.read_text(encoding="utf-8"), methods.groups(methods.load_rows())
    for group in groups:
        measured = {titles[row["method"]] for row in group.rows}
        lines = [line for line in methods.page("", [group], titles).splitlines() if line.startswith("| ")]
        assert all(line in page for line in lines if line.split(" | ")[0].removeprefix("| ") in measured)
    assert all(group.about in page.replace("\n", " ") for group in groups)


def test_untrained_cells_are_sweeps_and_have_one_seed(methods):
    cells = [cell for cell in methods.cells() if cell.method == "none"]
    assert [(cell.table, cell.seed) for cell in cells] == [("first", 0)]
    assert "--mode=sweep" in methods.command(cells[0], "runs/x")


def test_harder_organisms_are_left_out_until_they_are_built(methods, tmp_path, monkeypatch, capsys):
    performed = []
    monkeypatch.setattr(methods, "perform", lambda cell, out, organisms: performed.append(cell.organism) or 0)
    monkeypatch.setattr(methods, "load_rows", list)
    (tmp_path / "near_default/vlm").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["methods.py", "--table", "third", "--organisms", str(tmp_path)])
    assert methods.main() == 0
    assert "near_default" in performed and "many_refusals" not in performed
    assert "many_refusals: left out" in capsys.readouterr().err
    cell = methods.Cell("third", "lppo", "many_refusals", "mixed", 0)
    assert methods.fields(cell, tmp_path)["model.checkpoint"] == str(tmp_path / "many_refusals/vlm")
    assert methods.fields(cell)["reward.model"] == "runs/organisms/many_refusals/reward_model"


def test_unseen_nouns_are_in_no_training_row(methods):
    cell = methods.Cell("third", "lppo", "llava", "unseen_nouns", 0)
    config = icet_jax.load_config(methods.ORGANISMS["llava"], methods.fields(cell))

    def nouns(source):
        return {request_noun(row.prompt) for row in load_rows(source) if row.kind == "forbidden"}

    train, test = nouns(config.data.train), nouns(config.sweep.datasets["forbidden"])
    assert (len(train), len(test)) == (16, 8) and not train & test


@pytest.mark.parametrize("after", [True, False])
def test_the_numbers_of_a_run_are_those_of_its_files(methods, tmp_path, monkeypatch, after):
    run = synthetic.write_run(tmp_path / "run", after=after, parts=("utility", "difference", "cost"))
    monkeypatch.setattr(methods, "kl_at_the_default_exit", lambda folder: 0.25)
    side = "after" if after else "before"
    path = run / f"sweeps/{side}.forbidden.json"
    table = json.loads(path.read_text())
    estimate = {"mean": 0.5, "ci95": [0.4, 0.6]}
    table |= {"worst_exit": {"asr/world_exact": estimate | {"layer": 1}}, "any_exit": {"asr_any/world_exact": estimate}}
    path.write_text(json.dumps(table))
    rows = [{"step": step, "perf/tokens": 10.0, "perf/flops": 1e9} for step in (1, 2)]
    if after:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = methods.measured(run)
    assert (values["asr_worst"], values["asr_worst_ci95"]) == (50.0, [40.0, 60.0])
    assert (values["tokens"], values["flops"]) == ((20.0, 2e9) if after else (0.0, 0.0))
    assert values["seconds"] == (96.4 if after else 0.0) and values["kl_default_benign"] == (0.25 if after else 0.0)
    assert (values["utility_lost"] > 0) is after and (values["vqa_change"] < 0) is after


def test_settings_are_chosen_on_val_and_everything_else_is_of_the_test_split(methods):
    for cell in methods.cells():
        sources = str(methods.fields(cell)["sweep.datasets"]) + str(methods.fields(cell)["sweep.utility"])
        assert (":val:" in sources) == (cell.table == "settings") == (":test:" not in sources)


def test_the_limit_of_tokens_is_half_of_the_whole_budget_in_tables_of_half_the_budget_too(methods, write):
    page = write(
        [
            row(methods, "lppo", tokens=4000.0),
            row(methods, "lppo", variant="half_budget", tokens=2000.0, asr_worst=3.0),
            row(methods, "lsft", variant="half_budget", tokens=2001.0, asr_worst=1.5),
        ]
    )
    half = page[page.index("Half the iterations.") :]
    assert line_of(half, "L-PPO, stratified exits").endswith("| none |")
    assert line_of(half, "L-SFT").endswith("| tokens |")
