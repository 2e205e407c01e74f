"""The newer families learn by every algorithm: an iteration on a tiny checkpoint changes what it trains, no more."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

import icet_jax  # noqa: E402
from icet_jax.data.pairs import PairRecord, write_exit_pairs  # noqa: E402
from icet_jax.parallel.sharding import flatten_with_names  # noqa: E402
from icet_jax.runs import fingerprints, sources  # noqa: E402
from icet_jax.runs.loading import load  # noqa: E402
from tests import tiny_qwen, tiny_smolvlm  # noqa: E402

SETTINGS = {
    "data.train": "toy:forbidden", "data.mixture": "{'forbidden': 1.0}", "data.batch_size": 4,
    "data.max_prompt_tokens": 224, "lppo.max_new_tokens": 4, "lppo.epochs": 1, "lppo.minibatches": 1,
    "lppo.accumulation": 1, "log.tensorboard": "false", "sweep.exits": "all", "reward.model": "toy:reward_model",
}  # fmt: skip
FAMILIES = {
    "smolvlm": lambda folder: tiny_smolvlm.save(
        folder, tiny_smolvlm.model(num_hidden_layers=2, vision={"num_hidden_layers": 2})
    ),
    "qwen25vl": lambda folder: tiny_qwen.save(folder, tiny_qwen.model(num_hidden_layers=2, vision={"depth": 2})),
}
ALGORITHMS = {
    "lrloo": {"lrloo.iterations": 1, "lrloo.group_size": 2},
    "ldpo": {"ldpo.iterations": 1},
    "ldistill": {"ldistill.iterations": 1},
    "lsft": {"lsft.iterations": 1, "lsft.train": "both", "lppo.max_new_tokens": 48},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, checkpoint, {path: weight})."""
    checkpoint = FAMILIES[request.param](tmp_path_factory.mktemp(request.param))
    return request.param, checkpoint, flatten_with_names(load(checkpoint).params)


def write_pairs(folder):
    """A file with a pair for each row at an exit in turn."""
    rows = sources.load_rows(SETTINGS["data.train"])
    fingerprints.check_rows(folder / "rows", {"rows": rows})
    marks = fingerprints.recorded_rows(folder / "rows")["rows"]
    records = [PairRecord(row.id, marks[row.id], 1 + index % 2, "no", "yes") for index, row in enumerate(rows)]
    write_exit_pairs(folder / "pairs.jsonl", records)
    return {"ldpo.pairs": folder / "pairs.jsonl"}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_iteration_changes_what_it_trains(family, algorithm, tmp_path):
    name, checkpoint, before = family
    settings = SETTINGS | ALGORITHMS[algorithm] | {"algorithm": algorithm, "model.checkpoint": checkpoint}
    settings |= write_pairs(tmp_path) if algorithm == "ldpo" else {}
    vlm = icet_jax.train(icet_jax.load_config(f"configs/{name}_lppo.py:smoke", settings), tmp_path / "run")
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(row["loss/total_avg"])
    changed = {
        path.split("/")[0]
        for path, weight in flatten_with_names(vlm.params).items()
        if not np.array_equal(np.asarray(weight), np.asarray(before[path]))
    }
    assert changed == ({"projector"} if algorithm == "lsft" else set())
    assert any(np.asarray(pair["b"]).any() for pair in vlm.lora.weights.values())
