"""metrics.jsonl goes on where the restored checkpoint stands."""

import json

import pytest
from ml_collections import ConfigDict

from icet_jax.errors import UserError
from icet_jax.training import metrics_log


def config(tensorboard: bool = False, wandb: bool = False) -> ConfigDict:
    return ConfigDict({"log": {"every": 1, "tensorboard": tensorboard, "wandb": wandb}})


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_after_the_restored_step_and_a_cut_line_are_dropped(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, config(), step=0)
    for step in (1, 2, 3):
        log.write(step, {"objective/kl": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "objec')
    log = metrics_log.MetricsLog(tmp_path, config(), step=2)
    log.write(3, {"objective/kl": 30.0})
    log.close()
    assert [(row["step"], row["objective/kl"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, config(), step=0)
    log.write(1, {"a": float("nan"), "b": float("inf"), "c": 1.0})
    log.close()
    assert rows(tmp_path) == [{"step": 1, "a": None, "b": None, "c": 1.0}]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, config(tensorboard=True), step=0)
    log.write(1, {"objective/kl": 1.0})
    log.close()
    assert any(path.name.startswith("events.") for path in tmp_path.iterdir())


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        metrics_log.MetricsLog(tmp_path, config(wandb=True), step=0)
