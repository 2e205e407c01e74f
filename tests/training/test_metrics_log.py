"""metrics.jsonl goes on where the restored checkpoint stands."""

import json
import struct

import pytest
from ml_collections import ConfigDict
from tensorboardX.proto import event_pb2

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


def events(folder):
    """What TensorBoard shows of a folder, {(step, name): value}: a start at step n takes back what was from n on."""
    shown = {}
    for path in sorted(folder.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data, start = path.read_bytes(), 0
        while start < len(data):
            (length,) = struct.unpack_from("<Q", data, start)
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
            start += 12 + length + 4
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = {key: value for key, value in shown.items() if key[0] < event.step}
            shown |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    return shown


def test_tensorboard_has_every_number_as_soon_as_it_is_written(tmp_path):
    log = metrics_log.MetricsLog(tmp_path, config(tensorboard=True), step=0)
    row = {f"policy/number_{n}": float(n) for n in range(40)}
    for step in (1, 2):
        log.write(step, row)
        assert events(tmp_path) == {(past, name): row[name] for past in range(1, step + 1) for name in row}
    log.close()


def test_tensorboard_goes_on_after_the_restored_step_without_a_number_twice(tmp_path, monkeypatch):
    for session, (restored, steps) in enumerate([(0, (1, 2, 3)), (2, (3, 4))]):
        monkeypatch.setattr("time.time", lambda now=1e9 + session: now)  # it names the file
        log = metrics_log.MetricsLog(tmp_path, config(tensorboard=True), step=restored)
        for step in steps:
            log.write(step, {"objective/kl": step + 10.0 * session})
        log.close()
    assert events(tmp_path) == {
        (step, "objective/kl"): float(value) for step, value in ((1, 1), (2, 2), (3, 13), (4, 14))
    }


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        metrics_log.MetricsLog(tmp_path, config(wandb=True), step=0)
