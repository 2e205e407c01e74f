"""A warm start: the second training begins with the first one's policy and with nothing else of it."""

import json
import shutil

import numpy as np
import pytest

import icet_jax
from icet_jax.errors import UserError
from icet_jax.parallel.sharding import flatten_with_names

CONFIG = "configs/organism_lppo.py"
SMALL = {
    "data.train": " + ".join(f"organism:train:{kind}:24" for kind in ("forbidden", "benign", "vqa")),
    "data.batch_size": 8, "sweep.batch_size": 8, "log.tensorboard": "false", "lrloo.group_size": 2,
    **{f"{algorithm}.iterations": 2 for algorithm in ("lppo", "lsft", "ldistill", "lrloo", "ldpo")},
}  # fmt: skip


def train(workdir, **changes):
    """Trains without sweeps; returns the policy's arrays by name. `changes` are settings with `__` for the dots."""
    settings = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    policy = icet_jax.train(icet_jax.load_config(CONFIG, settings), workdir)
    weights = policy.params if policy.lora is None else policy.lora.weights
    return {name: np.asarray(array) for name, array in flatten_with_names(weights).items()}


def history(workdir):
    """metrics.jsonl without times."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("perf/time")} for row in rows]


def counted(workdir):
    """metrics.jsonl without anything that is measured in seconds."""
    timed = ("perf/time", "perf/mfu", "perf/tokens_per", "perf/samples_per")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in history(workdir)]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """L-SFT alone; L-PPO without a warm start; L-PPO after L-SFT; and the policies that the last two ended with."""
    folder = tmp_path_factory.mktemp("runs")
    policies = {
        "lsft": train(folder / "lsft", algorithm="lsft"),
        "lppo": train(folder / "lppo"),
        "both": train(folder / "both", warm_start="lsft"),
    }
    return folder, policies


def test_the_first_training_is_that_of_its_algorithm_alone(runs):
    folder, _ = runs
    assert counted(folder / "both" / "warm_start") == counted(folder / "lsft")
    config = json.loads((folder / "both" / "warm_start" / "config.json").read_text())
    assert (config["algorithm"], config["warm_start"]) == ("lsft", "")


def test_without_an_iteration_of_its_own_a_run_ends_with_the_first_policy(runs, tmp_path):
    folder, policies = runs
    of_algorithm = train(tmp_path / "algorithm", warm_start="lsft", lppo__iterations=0)
    of_run = train(tmp_path / "run", warm_start=str(folder / "lsft"), lppo__iterations=0)
    assert_equal(of_algorithm, policies["lsft"])
    assert_equal(of_run, policies["lsft"])


def test_a_run_directory_gives_the_same_bits_as_the_algorithm(runs, tmp_path):
    folder, policies = runs
    assert_equal(train(tmp_path / "run", warm_start=str(folder / "lsft")), policies["both"])
    assert_equal(train(tmp_path / "inner", warm_start=str(folder / "both" / "warm_start")), policies["both"])
    assert counted(tmp_path / "run") == counted(folder / "both") and not (tmp_path / "run" / "warm_start").exists()
    assert any(np.any(array != policies["lppo"][name]) for name, array in policies["both"].items())


def test_the_reference_is_the_model_before_all_training(runs):
    folder, _ = runs
    # The KL of the first rollout: the policy is the reference without a warm start, and L-SFT has moved it with one.
    assert history(folder / "lppo")[0]["objective/kl"] == 0.0
    assert abs(history(folder / "both")[0]["objective/kl"]) > 1e-4


def stages(workdir):
    """The stages of cost.json by name."""
    return {stage["name"]: stage for stage in json.loads((workdir / "cost.json").read_text())["phases"]}


def test_the_first_training_is_part_of_the_cost_once(runs):
    folder, _ = runs
    stage = stages(folder / "both")["warm_start"]
    rows = history(folder / "both" / "warm_start")
    assert stage["flops"] == sum(row["perf/flops"] for row in rows) > 0
    assert stage["tokens"] == sum(row["perf/tokens"] for row in rows) == 0  # L-SFT samples nothing


def test_a_row_for_every_second_iteration_costs_two(tmp_path):
    train(tmp_path, warm_start="lsft", log__every=2, lppo__iterations=0)
    (row,) = history(tmp_path / "warm_start")
    assert stages(tmp_path)["warm_start"]["flops"] == 2 * row["perf/flops"]
    train(tmp_path, warm_start="lsft", log__every=2, lppo__iterations=0)  # which still has no checkpoint of its own
    assert stages(tmp_path)["warm_start"]["flops"] == 2 * row["perf/flops"]


def test_a_finished_run_does_nothing_again_and_needs_the_first_training_no_more(runs, tmp_path):
    folder, policies = runs
    workdir = tmp_path / "both"
    shutil.copytree(folder / "both", workdir)
    shutil.rmtree(workdir / "warm_start")
    assert_equal(train(workdir, warm_start="lsft"), policies["both"])
    assert not (workdir / "warm_start").exists()


def test_a_run_that_has_begun_keeps_its_warm_start(runs, tmp_path):
    folder, _ = runs
    workdir = tmp_path / "both"
    shutil.copytree(folder / "both", workdir)
    for name in ("checkpoints", "metrics.jsonl"):  # as if it was stopped between the two trainings
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=r"another config: warm_start \('lsft' there, 'ldistill' now\)"):
        train(workdir, warm_start="ldistill")


@pytest.mark.parametrize(
    ("first", "second", "changes"),
    [
        ("lrloo", "ldistill", {"lora__rank": 0, "optimizer__learning_rate": 1e-4}),
        ("ldistill", "lrloo", {}),
        ("lppo", "lsft", {}),
        ("ldpo", "lsft", {}),
    ],
)
def test_every_algorithm_can_be_first(first, second, changes, tmp_path):
    alone = train(tmp_path / "alone", algorithm=first, **changes)
    start = {"warm_start": str(tmp_path / "alone"), f"{second}__iterations": 0}
    assert_equal(train(tmp_path / "start", algorithm=second, **start, **changes), alone)
    both = train(tmp_path / "both", algorithm=second, warm_start=first, **changes)
    assert both.keys() == alone.keys() and all(np.all(np.isfinite(array)) for array in both.values())
    assert counted(tmp_path / "both" / "warm_start") == counted(tmp_path / "alone")
    spent = stages(tmp_path / "both")
    assert spent["warm_start"]["flops"] > 0 and ("harvest" in spent) == (first == "ldpo")
    assert (tmp_path / "both" / "pairs").exists() == (first == "ldpo")


def edited(run, folder, **changes):
    """A copy of a run whose config.json has other values; `changes` have `__` for the dots."""
    shutil.copytree(run, folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        *sections, field = name.split("__")
        node = config
        for section in sections:
            node = node[section]
        node[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora__rank": 4}, r"config.lora.rank is 4 there and 8 here; a warm start needs the same adapters"),
        ({"lora__targets": ["q_proj"]}, r"config.lora.targets is \('q_proj',\) there and \("),
        ({"seeds": [3, 5]}, r"has one run per seed; give one of them, such as .*/other/seed_3"),
        ({"lsft__iterations": 9}, r"its training has not ended \(iteration 2 of 9\); start it again first"),
    ],
)
def test_an_earlier_run_that_does_not_fit_is_one_line(changes, says, runs, tmp_path):
    other = edited(runs[0] / "lsft", tmp_path / "other", **changes)
    with pytest.raises(UserError, match=rf"config.warm_start={other}: {says}") as caught:
        train(tmp_path / "run", warm_start=str(other))
    assert "\n" not in str(caught.value)


def test_an_earlier_run_of_another_model_is_refused(runs, tmp_path):
    other = edited(runs[0] / "lsft", tmp_path / "other")
    recorded = json.loads((other / "fingerprints.json").read_text())
    recorded["checkpoints"]["model"]["config.json"] = "0" * 16
    (other / "fingerprints.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match=r"model.checkpoint has other files \(1 changed \(config.json\) here\)"):
        train(tmp_path / "run", warm_start=str(other))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_last_checkpoint_gives_no_policy(runs, tmp_path):
    other = edited(runs[0] / "lsft", tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "2")
    (other / "checkpoints" / "2").mkdir()
    with pytest.raises(UserError, match="damaged|not ended"):
        train(tmp_path / "run", warm_start=str(other))
