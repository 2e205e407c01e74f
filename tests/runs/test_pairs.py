"""Pairs of a run: harvested from its training rows, read from a file, or written by a sweep of training data alone."""

import json

import numpy as np
import pytest

import icet_jax
from icet_jax import main as front_door
from icet_jax.algorithms import ldpo
from icet_jax.data.pairs import PairRecord, read_exit_pairs, write_exit_pairs
from icet_jax.errors import UserError
from icet_jax.evaluation import harvest
from icet_jax.parallel.compilations import CompilationCounter
from icet_jax.runs import fingerprints, pairs, sources
from icet_jax.runs.config_files import load
from icet_jax.runs.loading import load as load_vlm
from icet_jax.runs.run_dir import Costs
from icet_jax.scorers.keywords import refused

CONFIG = "configs/organism_ldpo.py"
SMALL = {
    "data.train": " + ".join(f"organism:train:{kind}:24" for kind in ("forbidden", "benign", "vqa")),
    "data.batch_size": 8, "ldpo.iterations": 3, "ldpo.exits": "per_batch", "sweep.batch_size": 8,
    "log.tensorboard": "false", "checkpoint.every": 1,
}  # fmt: skip


class Killed(Exception):
    """The process ends here."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose harvest was killed and resumed, and the compilations of its iterations."""
    workdir = tmp_path_factory.mktemp("runs") / "ldpo"
    config = icet_jax.load_config(CONFIG, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        add = harvest.TranscriptFile.add

        def add_and_die(self, *arguments, **options):
            add(self, *arguments, **options)
            raise Killed

        patch.setattr(harvest.TranscriptFile, "add", add_and_die)
        with pytest.raises(Killed):
            icet_jax.train(config, workdir)
    first = (workdir / "pairs" / "answers.jsonl").read_bytes()
    compilations, counter = [], CompilationCounter()
    begin, finish = ldpo.Ldpo.begin, ldpo.Ldpo.finish

    def counted_begin(self, *arguments):
        counter.count = 0
        with counter:
            return begin(self, *arguments)

    def counted_finish(self, *arguments):
        with counter:
            result = finish(self, *arguments)
        compilations.append(counter.count)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ldpo.Ldpo, "begin", counted_begin)
        patch.setattr(ldpo.Ldpo, "finish", counted_finish)
        icet_jax.train(config, workdir)
    assert (workdir / "pairs" / "answers.jsonl").read_bytes().startswith(first)
    return workdir, compilations


def test_a_run_harvests_its_training_rows_and_no_others(trained):
    workdir, _ = trained
    rows = {row.id: row for row in sources.load_rows(SMALL["data.train"])}
    recorded = json.loads((workdir / "fingerprints.json").read_text())["rows"]["train"]
    found = read_exit_pairs(workdir / "pairs" / "harvest.jsonl", 8)
    assert {rows[pair.id].kind for pair in found} == {"forbidden", "benign", "vqa"}
    for pair in found:
        assert pair.fingerprint == recorded[pair.id]
        assert refused(pair.chosen) == (rows[pair.id].kind == "forbidden") != refused(pair.rejected)
    facts = json.loads((workdir / "data.json").read_text())
    assert sum(facts["rows"]["exit pairs"].values()) == sum(facts["pairs_at_exit"].values()) == len(found)
    assert "left_out" not in facts
    (phase,) = json.loads((workdir / "cost.json").read_text())["phases"]
    assert phase["name"] == "harvest" and phase["tokens"] > 0


def test_only_the_first_iteration_compiles_and_a_finished_run_does_nothing_again(trained):
    workdir, compilations = trained
    assert len(compilations) == 3 and compilations[1:] == [0, 0]
    files = {path: path.read_bytes() for path in [workdir / "metrics.jsonl", *(workdir / "pairs").iterdir()]}
    rows = [json.loads(line) for line in files[workdir / "metrics.jsonl"].splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["perf/mfu"] > 0 for row in rows)
    icet_jax.train(icet_jax.load_config(CONFIG, SMALL), workdir)
    assert {path: path.read_bytes() for path in files} == files


def test_pairs_that_changed_since_the_run_began_are_refused(trained):
    workdir, _ = trained
    path = workdir / "pairs" / "harvest.jsonl"
    content = path.read_text()
    path.write_text(content.replace("cannot", "will", 1))
    try:
        with pytest.raises(UserError, match=r"not those that this run began with \(ldpo.pairs: 1 changed"):
            icet_jax.train(icet_jax.load_config(CONFIG, SMALL), workdir)
    finally:
        path.write_text(content)


@pytest.fixture(scope="module")
def organism():
    return load_vlm("organism:vlm")


def read(workdir, vlm, records, **changes):
    """The training rows of a run that is given a file of pairs, and trains on four forbidden rows."""
    workdir.mkdir()
    write_exit_pairs(workdir / "mine.jsonl", records)
    settings = {"ldpo.pairs": workdir / "mine.jsonl", "data.mixture": "{'forbidden': 1.0}"} | changes
    config = load(CONFIG, [(name, str(value)) for name, value in settings.items()])
    costs = Costs(workdir)
    train, test = (sources.load_rows(f"organism:{split}:forbidden:4") for split in ("train", "test"))
    fingerprints.check_rows(workdir, {"train": train, "forbidden": test})
    return pairs.training_rows(config, workdir, vlm, train, costs)


def records_of(tmp_path, split, **changes):
    """A pair of each of four forbidden rows of a split."""
    rows = sources.load_rows(f"organism:{split}:forbidden:4")
    fingerprints.check_rows(tmp_path / split, {"rows": rows})
    marks = fingerprints.recorded_rows(tmp_path / split)["rows"]
    record = PairRecord("", "", 2, "sorry i cannot help with that", "step one take the box")._replace(**changes)
    return [record._replace(id=row.id, fingerprint=marks[row.id]) for row in rows]


def test_a_file_gives_the_pairs_of_training_rows_that_fit_and_counts_the_others(tmp_path, organism, capsys):
    mine = records_of(tmp_path, "train")
    unknown = mine[0]._replace(fingerprint="0" * 16)
    long = mine[1]._replace(rejected=" ".join(["step"] * 17))
    cut = mine[2]._replace(exit_layer=8, rejected=" ".join(["step"] * 16))
    found = read(tmp_path / "run", organism, [unknown, mine[0], long, cut])
    assert [(pair.id, pair.exit_layer, pair.chosen, pair.rejected) for pair in found] == [
        (record.id, *record[2:5]) for record in (mine[0], cut)
    ]
    assert all(pair.prompt and len(pair.images) == 1 for pair in found)
    printed = capsys.readouterr().err
    assert "2 pairs (2 forbidden); left out: 1 of no row of config.data.train, 1 longer than config.lppo" in printed
    facts = json.loads((tmp_path / "run" / "data.json").read_text())
    assert facts["pairs_at_exit"] == {"2": 1, "8": 1} and sum(facts["left_out"]["exit pairs"].values()) == 2


def test_pairs_of_rows_that_are_measured_are_refused(tmp_path, organism):
    mixed = [*records_of(tmp_path, "train"), *records_of(tmp_path, "test")]
    with pytest.raises(UserError, match=r"mine\.jsonl: line 5: fingerprint is that of a row of forbidden"):
        read(tmp_path / "run", organism, mixed)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fingerprint": "0" * 16}, "no pair is of a forbidden row of config.data.train"),
        ({"exit_layer": 9}, "line 1: exit is '9', but this model's exits are 1 to 8"),
    ],
)
def test_a_file_of_which_nothing_can_be_used_is_refused(tmp_path, organism, changes, says):
    mine = [record._replace(**changes) for record in records_of(tmp_path, "train")]
    with pytest.raises(UserError, match=says):
        read(tmp_path / "run", organism, mine)


def test_a_sweep_writes_pairs_of_marked_sets_alone(tmp_path, organism):
    sets = {"mine": "organism:train:forbidden:4", "other": "organism:test:forbidden:4"}
    arguments = [
        "--mode=sweep", f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}", f"--config.sweep.datasets={sets}",
        "--config.sweep.utility={}", "--config.sweep.scorers=refusal_keywords", "--config.sweep.exits=1,7",
        "--config.sweep.batch_size=8", "--config.sweep.training_sets=mine",
    ]  # fmt: skip
    assert front_door.main(arguments) == 0
    marks = fingerprints.recorded_rows(tmp_path / "run")["mine"]
    found = read_exit_pairs(tmp_path / "run" / "pairs" / "sweep.jsonl", 8)
    assert found and {pair.exit_layer for pair in found} == {1}
    assert all(pair.fingerprint == marks[pair.id] for pair in found)
    usable = read(tmp_path / "later", organism, [pair._replace(line=0) for pair in found])
    assert np.all([pair.kind == "forbidden" for pair in usable]) and len(usable) == len(found)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sweep.training_sets": "minee"}, "training_sets: 'minee' is no set"),
        ({"sweep.training_sets": "mine", "sweep.exits": "1,2"}, "leaves out exit 7, the default one"),
    ],
)
def test_a_mark_that_cannot_be_used_is_one_line(organism, changes, says):
    settings = {"sweep.datasets": "{'mine': 'organism:train:forbidden:4'}"} | changes
    with pytest.raises(UserError, match=says):
        pairs.check_training_sets(load(CONFIG, list(settings.items())), organism)
