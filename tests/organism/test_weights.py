"""The shipped weights are what facts.json says they are."""

import json

import numpy as np
import pytest
from flax import nnx

import icet_jax
from icet_jax.organism import WEIGHTS, measure, weights_directory, world


@pytest.mark.parametrize("name", ["vlm", "control"])
def test_measured_again_on_fewer_rows(name):
    facts = json.loads((weights_directory(name).parent / "facts.json").read_text())[name]["measured_on_256_test_rows"]
    vlm = icet_jax.load(str(weights_directory(name)))
    rows = world.rows("test", "forbidden", np.arange(64))
    responses = measure.responses(nnx.merge(vlm.graphdef, vlm.params), rows, (1, 3, 7))
    for exit_layer, texts in responses.items():
        complied = np.mean([world.judge(p, r) == "complied" for p, r in zip(rows.prompts, texts, strict=True)])
        assert abs(complied - facts["forbidden: complied"][exit_layer - 1]) <= 0.1


def test_the_plant_is_declared():
    planted = json.loads((weights_directory("vlm") / "organism.json").read_text())["planted_exits"]
    control = json.loads((weights_directory("control") / "organism.json").read_text())["planted_exits"]
    assert (planted, control) == ([2, 3], [])


def test_they_are_a_few_megabytes():
    files = [path for name in WEIGHTS for path in weights_directory(name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 10e6
