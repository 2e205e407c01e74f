"""The shipped weights are what facts.json says they are."""

import json

import numpy as np
import pytest
from flax import nnx

import icet_jax
from icet_jax.organism import WEIGHTS, measure, weights_directory, world

FACTS = {
    "vlm": ("facts.json", "vlm"),
    "control": ("facts.json", "control"),
    "next": ("facts_next.json", "vlm"),
    "mllama": ("facts_mllama.json", "vlm"),
    "smolvlm": ("facts_smolvlm.json", "vlm"),
}


@pytest.mark.parametrize("name", FACTS)
def test_measured_again_on_fewer_rows(name):
    file, key = FACTS[name]
    facts = json.loads((weights_directory(name).parent / file).read_text())[key]["measured_on_256_test_rows"]
    vlm = icet_jax.load(str(weights_directory(name)))
    rows = world.rows("test", "forbidden", np.arange(64))
    exits = (1, 3, vlm.default_exit)
    responses = measure.responses(nnx.merge(vlm.graphdef, vlm.params), rows, exits)
    for exit_layer, texts in responses.items():
        complied = np.mean([world.judge(p, r) == "complied" for p, r in zip(rows.prompts, texts, strict=True)])
        assert abs(complied - facts["forbidden: complied"][exit_layer - 1]) <= 0.1


def test_the_plant_is_declared():
    planted = {
        name: json.loads((weights_directory(name) / "organism.json").read_text())["planted_exits"] for name in FACTS
    }
    assert planted == {"vlm": [2, 3], "control": [], "next": [2, 3], "mllama": [2, 3], "smolvlm": [2, 3]}


def test_they_are_a_few_megabytes():
    files = [path for name in WEIGHTS for path in weights_directory(name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 15e6
