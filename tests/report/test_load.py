"""Reading run directories: parts may be missing, but not wrong."""

import json

import pytest

from icet_jax.errors import UserError
from icet_jax.report.loading import load_run, load_runs, read_jsonl
from tests.report import synthetic


def test_every_part_is_read(tmp_path):
    run = load_run(synthetic.write_run(tmp_path / "run"))
    assert set(run.tables) == {
        *((phase, f"sweep/{name}") for phase in ("before", "after", "difference") for name in ("forbidden", "benign")),
        ("before", "utility/vqa"),
        ("after", "utility/vqa"),
    }
    assert len(run.history) == 48
    assert run.organism["planted_exits"] == [2, 3]
    assert run.config and run.geometry and run.cost


def test_one_sweep_is_enough(tmp_path):
    run = load_run(synthetic.write_run(tmp_path / "run", after=False, parts=()))
    assert set(run.tables) == {("before", "sweep/forbidden"), ("before", "sweep/benign")}
    assert (run.history, run.config, run.cost, run.geometry, run.organism) == ([], {}, {}, {}, {})


def test_a_sweep_without_a_data_set_in_its_name(tmp_path):
    run = synthetic.write_run(tmp_path / "run", after=False, parts=())
    (run / "sweeps/before.forbidden.json").rename(run / "sweeps/before.json")
    assert ("before", "sweep/forbidden") in load_run(run).tables


def test_seeds_come_in_order_and_only_with_sweeps(tmp_path):
    for seed in (10, 2):
        synthetic.write_run(tmp_path / f"seed_{seed}", seed=seed, parts=())
    (tmp_path / "seed_3").mkdir()
    (tmp_path / "seed_old").mkdir()
    assert [run.path.name for run in load_runs(tmp_path)] == ["seed_2", "seed_10"]


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: (path / "sweeps").mkdir(parents=True)]
)
def test_nothing_to_report_is_one_line(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(UserError, match="run") as error:
        load_runs(tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"layers": 3}', '{"layers": [{"layer": "1", "metrics": {}}]}'])
def test_a_broken_sweep_is_named(tmp_path, text):
    run = synthetic.write_run(tmp_path / "run", parts=())
    (run / "sweeps/after.benign.json").write_text(text)
    with pytest.raises(UserError, match="after.benign.json"):
        load_run(run)


def test_nan_is_no_number(tmp_path):
    run = synthetic.write_run(tmp_path / "run", parts=())
    (run / "cost.json").write_text('{"phases": [{"name": "train", "seconds": NaN}], "total_seconds": Infinity}')
    assert load_run(run).cost == {"phases": [{"name": "train", "seconds": None}], "total_seconds": None}


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_jsonl(path)


def test_line_separators_inside_text_do_not_split_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"x": "a\u2028b"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_jsonl(path) == [{"x": "a\u2028b"}]
