"""cost.json adds up over restarts and counts compilations."""

import json

import jax
import jax.numpy as jnp
import pytest

from icet_jax.config import organism
from icet_jax.errors import UserError
from icet_jax.runs import run_dir
from icet_jax.runs.run_dir import Costs


def phases(folder):
    return {phase["name"]: phase for phase in json.loads((folder / "cost.json").read_text())["phases"]}


def test_costs_add_up_over_restarts(tmp_path):
    with Costs(tmp_path).stage("train") as cost:
        cost["tokens"] = 10
    first = phases(tmp_path)["train"]
    costs = Costs(tmp_path)
    with costs.stage("train") as cost:
        cost["tokens"] = 5
    with costs.stage("export"):
        pass
    both = phases(tmp_path)
    assert list(both) == ["train", "export"]
    assert both["train"]["tokens"] == 15 and both["train"]["seconds"] > first["seconds"]
    assert both["train"]["tokens_per_second"] == pytest.approx(15 / both["train"]["seconds"])


def test_a_phase_that_fails_is_counted_too(tmp_path):
    with pytest.raises(KeyboardInterrupt), Costs(tmp_path).stage("train"):
        raise KeyboardInterrupt
    assert "train" in phases(tmp_path)


def test_compilations_are_counted_by_jaxs_own_events(tmp_path):
    function = jax.jit(lambda x: jnp.sin(x) * 3)
    x = jnp.arange(7.0)
    costs = Costs(tmp_path)
    for name in ("first", "second"):
        with costs.stage(name):
            function(x).block_until_ready()
    assert phases(tmp_path)["first"]["compilations"] >= 1
    assert phases(tmp_path)["second"]["compilations"] == 0


def test_a_run_that_defined_perspective_and_did_not_use_it_goes_on(tmp_path):
    config = organism()
    run_dir.claim(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["scorers"] = {"perspective": {"kind": "perspective", "attributes": ["TOXICITY"]}}
    path.write_text(json.dumps(values))
    run_dir.claim(tmp_path, config)
    values["sweep"]["scorers"] = [*values["sweep"]["scorers"], "perspective"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="holds a run of another config: scorers"):
        run_dir.claim(tmp_path, config)


def test_a_run_from_before_a_field_existed_goes_on(tmp_path):
    config = organism()
    run_dir.claim(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text("")
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["data"]["template"]
    path.write_text(json.dumps(values))
    run_dir.claim(tmp_path, config)
    stored = run_dir.read_config(path)
    assert stored.data.template is None and stored.data.mixture == config.data.mixture
    values["data"]["mixture"] = {"forbidden": 1.0}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="holds a run of another config: data.mixture"):
        run_dir.claim(tmp_path, config)
