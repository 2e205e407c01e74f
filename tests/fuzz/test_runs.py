"""The command line's overrides, and what a run keeps for itself."""

import json

from hypothesis import given
from hypothesis import strategies as st

from icet_jax.config import OPEN_FIELDS, default, flatten
from icet_jax.runs import config_files
from icet_jax.runs.run_dir import Costs, read_config
from icet_jax.runs.sources import organism_facts
from icet_jax.training.metrics_log import truncate
from tests.fuzz.damage import TRICKS, as_json, cases, files, joined, mutated, outcome, torn, values

FIELDS = sorted(flatten(default()))
names = st.sampled_from(FIELDS) | st.sampled_from(
    (
        *(f"{field}.{key}" for field in OPEN_FIELDS for key in ("new", "vqa", "..", "a/b")),
        "scorers.judge.kind",
        "scorers.judge.batch_size",
        "scorers.judge",
        "scorers.judge.x.y",
        "model",
        "lppo",
        "sweep",
        ".",
        "a..b",
        "seeds.0",
        *TRICKS,
    )
)
texts = st.one_of(
    st.sampled_from(TRICKS),
    st.sampled_from(
        (
            "1",
            "-1",
            "0.5",
            "inf",
            "nan",
            "1e400",
            "true",
            "none",
            "1,2,3",
            "a,b",
            "()",
            "{}",
            "{'a': 1}",
            "{1: 2}",
            "{'a.b': 1}",
            "{'a': {'kind': 'reward_model'}}",
            "{[]: 1}",
            "[" * 500,
            "{" * 5000,
            "-" * 5000 + "1",
            "lppo",
            "{'judge': {'kind': 'llama_guard', 'checkpoint': 'x'}}",
            "__import__('os')",
            "9" * 5000,
            "1_0",
            "\u0663",
        )
    ),
    values().map(repr),
    joined(TRICKS),
)


@cases(300, part=2)
@given(st.tuples(names, texts).map(lambda one: [one]) | st.lists(st.tuples(names, texts), min_size=2, max_size=3))
def test_overrides(overrides):
    config, _ = outcome(config_files.load, None, overrides)
    if config is not None:
        json.dumps(flatten(config))


@cases(100, part=4)  # each is two readings
@given(names, texts)
def test_overrides_of_scorers(name, text):
    outcome(
        config_files.load, None, [("scorers", "{'judge': {'kind': 'llama_guard', 'checkpoint': 'x'}}"), (name, text)]
    )
    outcome(config_files.load, None, [("scorers", text), ("scorers.judge.batch_size", "8")])


@cases(60)
@given(st.sampled_from(TRICKS) | st.text(max_size=20))
def test_names_of_config_files(spec):
    if spec:
        outcome(config_files.load, spec)


def test_what_a_run_keeps(tmp_path):
    config = {"lppo": {"iterations": 3}, "seeds": [1, 2], "scorers": {}}
    cost = {"schema": 1, "phases": [{"name": "train", "seconds": 1.0, "compilations": 2, "compile_seconds": 0.5}]}
    organism = {"name": "vlm", "planted_exits": [1]}

    @cases(60)
    @given(files(config), files(cost), files(organism))
    def holds(one, two, three):
        (tmp_path / "config.json").write_bytes(one)
        outcome(read_config, tmp_path / "config.json")
        (tmp_path / "cost.json").write_bytes(two)
        outcome(Costs, tmp_path)
        (tmp_path / "organism.json").write_bytes(three)
        facts, _ = outcome(organism_facts, str(tmp_path))
        assert facts is None or isinstance(facts, dict)

    holds()


def test_metrics_of_an_interrupted_run(tmp_path):
    path, rows = tmp_path / "metrics.jsonl", [{"step": step, "loss": 0.5} for step in range(4)]
    valid = b"".join(as_json(row) + b"\n" for row in rows)

    @cases(150)
    @given(
        torn(valid)
        | mutated(rows).map(lambda all_: b"\n".join(map(as_json, all_)) if isinstance(all_, list) else b"")
        | files(rows[0])
    )
    def holds(content):
        path.write_bytes(content)
        outcome(truncate, path, 2)
        assert all(json.loads(line)["step"] <= 2 for line in path.read_text().splitlines())

    holds()
