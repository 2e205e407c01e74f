"""The record of a run's starts."""

import json
import sys
from pathlib import Path

import jax
import pytest

import icet_jax
from icet_jax.errors import UserError
from icet_jax.runs import provenance


def starts(folder):
    return json.loads((folder / "run.json").read_text())["starts"]


def test_every_start_is_recorded_with_versions_devices_and_the_command(tmp_path, monkeypatch):
    main = str(Path(icet_jax.__file__).with_name("main.py"))
    monkeypatch.setattr(sys, "argv", [main, "--config=a b.py"])
    provenance.record_start(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/icet-jax", "sweep"])
    provenance.record_start(tmp_path)
    first, second = starts(tmp_path)
    assert first["command"] == "python -m icet_jax.main '--config=a b.py'" and second["command"] == "icet-jax sweep"
    assert first["version"] == icet_jax.__version__ and first["jax"] == jax.__version__
    assert first["device"].startswith("cpu, ") and first["processes"] == 1
    assert second["date"] >= first["date"] and first["date"].endswith("+00:00")


def test_a_commit_is_named_only_where_the_package_has_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(icet_jax, "__file__", str(tmp_path / "icet_jax/__init__.py"))
    provenance.record_start(tmp_path)
    assert starts(tmp_path)[0]["commit"] is None


@pytest.mark.parametrize("content", ["{", "[]", '{"starts": 3}', '{"starts": ["x"]}'])
def test_a_damaged_record_is_named_and_kept(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json: not the record of a run .*; remove the file"):
        provenance.record_start(tmp_path)
    assert (tmp_path / "run.json").read_text() == content
