"""Runs of L-SFT that train the projector: stopped and resumed, started from, refused, and aligned from end to end."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import icet_jax
from icet_jax import main
from icet_jax.errors import UserError
from icet_jax.parallel.sharding import flatten_with_names
from icet_jax.runs.loading import load
from tests.runs import smoke

CONFIG = "configs/organism_lppo.py"
SMALL = {
    "algorithm": "lsft",
    "data.train": " + ".join(f"organism:train:{kind}:24" for kind in ("forbidden", "benign", "vqa")),
    "data.batch_size": 8,
    "lppo.max_new_tokens": 16,
    "lsft.iterations": 4,
    "checkpoint.every": 2,
    "optimizer.schedule": "cosine",
    "log.tensorboard": "false",
}


def settings(**changes):
    return SMALL | {name.replace("__", "."): value for name, value in changes.items()}


def weights(vlm):
    """{path: array} of a model, with its adapters."""
    arrays = flatten_with_names(vlm.params) | ({} if vlm.lora is None else flatten_with_names(vlm.lora.weights))
    return {name: np.asarray(array) for name, array in arrays.items()}


def train(workdir, **changes):
    return weights(icet_jax.train(icet_jax.load_config(CONFIG, settings(**changes)), workdir))


def changed(one, other):
    """The parts of the model in which two models differ, with "lora" for adapters."""
    assert one.keys() >= other.keys()
    names = {name for name in one if name not in other or not np.array_equal(one[name], other[name])}
    return {name.split("/")[0] if name[-2:] != "/a" and name[-2:] != "/b" else "lora" for name in names}


@pytest.fixture(scope="module")
def base():
    return weights(load("organism:vlm"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of the projector alone and one of both, and the models they ended with."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {name: train(folder / name, lsft__train=name) for name in ("projector", "both")}


def test_a_run_changes_what_it_trains_and_nothing_else(runs, base):
    _, models = runs
    assert changed(models["projector"], base) == {"projector"}
    assert changed(models["both"], base) == {"projector", "lora"}


@pytest.mark.parametrize("name", ["projector", "both"])
def test_a_run_that_lost_its_last_iterations_ends_with_the_same_bits(runs, tmp_path, name):
    folder, models = runs
    killed = tmp_path / "killed"
    shutil.copytree(folder / name, killed)
    shutil.rmtree(killed / "checkpoints" / "4")
    assert [path.name for path in (killed / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]
    again = train(killed, lsft__train=name)
    assert again.keys() == models[name].keys()
    for path, array in models[name].items():
        np.testing.assert_array_equal(again[path], array, err_msg=path)


def test_a_training_of_both_starts_from_the_projector_of_another_run(runs, base, tmp_path):
    folder, models = runs
    started = train(
        tmp_path / "run", lsft__train="both", warm_start=str(folder / "projector"), lsft__iterations=0, lora__rank=2
    )  # fmt: skip
    for path in base:
        np.testing.assert_array_equal(started[path], models["projector"][path], err_msg=path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lsft__train": "language"}, "trains parts that this run keeps frozen (lsft.train=both there); export its"),
        ({"algorithm": "lppo", "lppo__iterations": 1}, "trains parts that this run keeps frozen (lsft.train=both"),
        ({"lsft__train": "both", "lora__rank": 2}, "config.lora.rank is 8 there and 2 here"),
    ],
)
def test_a_start_that_would_lose_a_trained_part_is_refused(runs, tmp_path, changes, says):
    folder, _ = runs
    with pytest.raises(UserError) as error:
        train(tmp_path / "run", **{"warm_start": str(folder / "both"), **changes})
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_first_training_of_the_projector_is_refused_before_anything_is_loaded():
    changes = settings(algorithm="lppo", warm_start="lsft", lsft__train="projector")
    with pytest.raises(UserError, match=r"config.warm_start=lsft: that training trains parts"):
        icet_jax.load_config(CONFIG, changes)


@pytest.mark.parametrize("form", ["adapter", "both"])
def test_an_adapter_cannot_hold_a_projector(tmp_path, form, capsys):
    arguments = smoke.arguments(tmp_path / "run", algorithm="lsft", lsft__train="both", export__form=form)
    assert main.main(arguments) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "an adapter does not hold the projector, which config.lsft.train=both trains; use full" in printed
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_whole_run_measures_exports_and_reports_the_trained_projector(tmp_path):
    workdir = tmp_path / "run"
    job = {"algorithm": "lsft", "lsft__train": "both", "lsft__iterations": "3", "lppo__max_new_tokens": "48"}
    job |= {"optimizer__learning_rate": "1e-2", "sweep__exits": "23", "sweep__utility": "{}"}
    assert main.main(smoke.arguments(workdir, **job)) == 0
    assert json.loads((workdir / "export_check.json").read_text())["passed"]
    page, card = (workdir / "report.html").read_text(), (workdir / "hf" / "README.md").read_text()
    assert "projector and language model" in page
    assert "Measured before training, which changed the projector." in page
    assert "its language model and projector were trained at sampled exits; image encoder is unchanged" in card
    assert "| Trained | LoRA on the language model and the whole projector |" in card
    spec = json.loads((workdir / "config.json").read_text())["model"]["checkpoint"]
    source = safetensors.numpy.load_file(workdir / "toy" / spec.split(":")[1] / "model.safetensors")
    exported = safetensors.numpy.load_file(workdir / "hf" / "model.safetensors")
    differing = {name for name in source if not np.array_equal(source[name], exported[name])}
    projector = {name for name in source if "multi_modal_projector" in name}
    assert projector <= differing and not {name for name in differing if "vision_tower" in name}
