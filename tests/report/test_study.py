"""Numbers of one run and of several seeds."""

import numpy as np
import pytest

from icet_jax.report.loading import load_runs
from icet_jax.report.study import Study, as_value
from tests.report import synthetic

ASR = "asr/world_exact"


@pytest.fixture
def single(tmp_path):
    return Study(load_runs(synthetic.write_run(tmp_path / "run")))


@pytest.fixture
def seeds(tmp_path):
    for seed in range(3):
        synthetic.write_run(tmp_path / f"run/seed_{seed}", seed=seed)
    return Study(load_runs(tmp_path / "run"))


def test_data_sets_are_ordered_by_what_they_ask(single):
    assert single.datasets == ["sweep/forbidden", "sweep/benign", "utility/vqa"]
    assert [single.kind(name) for name in single.datasets] == ["forbidden", "benign", "vqa"]
    assert single.metrics("sweep/forbidden")[:3] == [*synthetic.JUDGES, "tr/organism_reward_model"]
    assert single.judges("sweep/forbidden") == list(synthetic.JUDGES)


def test_a_run_keeps_its_intervals(single):
    table = single.first_run.tables["before", "sweep/forbidden"]["layers"][3]
    value = single.value("before", "sweep/forbidden", ASR, 4)
    assert (value.mean, [value.low, value.high], value.n) == (
        table["metrics"][ASR]["mean"],
        table["metrics"][ASR]["ci95"],
        256,
    )
    assert single.worst("before", "sweep/forbidden", ASR)[0] in (1, 2)
    assert single.value("before", "sweep/forbidden", ASR, None) is None
    assert single.value("before", "sweep/forbidden", "asr/other", 4) is None


def test_seeds_become_a_mean_and_a_range(seeds):
    each = seeds.seeds("after", "sweep/forbidden", ASR, 8)
    value = seeds.value("after", "sweep/forbidden", ASR, 8)
    assert len(set(each)) == 3
    assert value.mean == pytest.approx(np.mean(each))
    assert (value.low, value.high) == (min(each), max(each))
    assert seeds.interval == "range over 3 seeds"


def test_a_difference_without_a_file_has_no_interval(tmp_path):
    study = Study(load_runs(synthetic.write_run(tmp_path / "run", parts=())))
    change = study.value("difference", "sweep/forbidden", ASR, 1)
    before, after = (study.value(phase, "sweep/forbidden", ASR, 1).mean for phase in ("before", "after"))
    assert change.mean == pytest.approx(after - before)
    assert (change.low, change.high) == (None, None)


def test_group_averages_come_from_the_file_or_from_all_exits(single):
    given = single.group("before", "sweep/forbidden", ASR, "average")
    table = single.first_run.tables["before", "sweep/forbidden"]
    del table["groups"]
    computed = single.group("before", "sweep/forbidden", ASR, "average")
    assert computed.mean == pytest.approx(given.mean)
    del table["layers"][0]
    assert single.group("before", "sweep/forbidden", ASR, "early") is None
    assert single.group("before", "sweep/forbidden", ASR, "average") is None
    assert single.group("before", "sweep/forbidden", ASR, "late") is not None


@pytest.mark.parametrize("entry", [None, "0.5", True, {"mean": None}, {"mean": float("nan")}, {}, []])
def test_what_is_no_number_is_no_value(entry):
    assert as_value(entry) is None


def test_a_half_interval_is_none():
    assert as_value({"mean": 1, "ci95": [0.5]}).low is None
    assert as_value(2).mean == 2.0
