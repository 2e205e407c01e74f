"""A run directory that has begun is refused for other rows or other weights, and opens for the same ones."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from icet_jax import main
from icet_jax.commands import align, sweep
from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.runs import common, config_files, fingerprints, loading
from tests import tiny

CSV = "id,prompt,image,kind,answer\na,placeholder one,one.png,forbidden,\nb,placeholder two,two.png,vqa,red\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.save_llava(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def vlm(checkpoint):
    return loading.load(checkpoint)


@pytest.fixture
def data(tmp_path):
    """A folder with prompts.csv and its images."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index, name in enumerate(("one.png", "two.png")):
        Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(folder / name)
    (folder / "prompts.csv").write_text(CSV)
    return folder


@pytest.fixture
def start(tmp_path, data, checkpoint, vlm, monkeypatch, capsys):
    """Starts a sweep that loads its rows and leaves a result; returns the exit code and the last line of stderr."""
    monkeypatch.setattr(loading, "load", lambda *_, **__: vlm)
    monkeypatch.setattr("icet_jax.parallel.compilations.keep_programs", lambda where: None)

    def measure(config, workdir):
        common.load_inputs(config, workdir)
        (workdir / "transcripts").mkdir(exist_ok=True)

    monkeypatch.setattr(sweep, "measure", measure)

    def run(*more, workdir=tmp_path / "run"):
        rows = f"--config.sweep.datasets.mine={data / 'prompts.csv'}"
        model = f"--checkpoint={checkpoint}"
        code = main.main(["--mode=sweep", f"--workdir={workdir}", model, rows, *more])
        return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return run


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def new_pixels(folder):
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(folder / "two.png")


CHANGES = {
    "prompt": (lambda folder: edit(folder / "prompts.csv", "placeholder one", "another"), "1 changed (a)"),
    "kind": (lambda folder: edit(folder / "prompts.csv", "forbidden", "benign"), "1 changed (a)"),
    "answer": (lambda folder: edit(folder / "prompts.csv", "red", "blue"), "1 changed (b)"),
    "image": (new_pixels, "1 changed (b)"),
    "rows": (
        lambda folder: edit(folder / "prompts.csv", "a,placeholder one", "c,placeholder one"),
        "1 added (c), 1 removed (a)",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_that_has_begun_is_refused_with_other_rows(what, start, data, tmp_path):
    change, said = CHANGES[what]
    assert start()[0] == 0 and start()[0] == 0
    before = (tmp_path / "run" / "data.json").read_bytes()
    stored = {path: path.read_bytes() for path in data.iterdir()}
    change(data)
    code, line = start()
    assert code == 2 and f"the rows are not those that this run began with (mine: {said})" in line
    assert f"--workdir={tmp_path / 'run'}: " in line and "choose another --workdir" in line
    assert (tmp_path / "run" / "data.json").read_bytes() == before
    assert start(workdir=tmp_path / "new")[0] == 0
    for path, content in stored.items():
        path.write_bytes(content)
    assert start()[0] == 0


def test_a_run_directory_without_fingerprints_opens_and_gets_them(start, data, tmp_path):
    assert start()[0] == 0
    (tmp_path / "run" / "fingerprints.json").unlink()
    assert start()[0] == 0
    edit(data / "prompts.csv", "placeholder one", "another")
    assert start()[0] == 2


def test_a_run_that_began_before_attack_formats_were_kept_goes_on(tmp_path):
    (tmp_path / "transcripts").mkdir()
    without = [Example("a", "how do i make a zorb", category="p"), Example("b", "what is it", kind="vqa", answer="red")]
    known = {"mine": {"a": "379cbe10f91a49a6", "b": "e904959907a316af"}}  # as they were written then
    path = tmp_path / "fingerprints.json"
    path.write_text(json.dumps({"schema": 1, "rows": known}))
    recorded = path.read_bytes()
    fingerprints.check_rows(tmp_path, {"mine": without})
    fingerprints.check_rows(tmp_path, {"mine": [replace(without[0], format="SD", transferred=True), without[1]]})
    assert path.read_bytes() == recorded
    with pytest.raises(UserError, match="1 changed"):
        fingerprints.check_rows(tmp_path, {"mine": [replace(without[0], category="q"), without[1]]})


def test_a_run_that_has_not_begun_takes_other_rows(start, data, tmp_path):
    assert start()[0] == 0
    (tmp_path / "run" / "transcripts").rmdir()
    edit(data / "prompts.csv", "placeholder one", "another")
    assert start()[0] == 0 and start()[0] == 0


def test_damaged_fingerprints_are_named(start, tmp_path):
    assert start()[0] == 0
    for damaged in ("{", "[]", '{"rows": {"mine": {"a": 1}}}', '{"rows": {"mine": "a"}}'):
        (tmp_path / "run" / "fingerprints.json").write_text(damaged)
        code, line = start()
        assert code == 2 and "fingerprints.json: not a run's fingerprints" in line and "remove it" in line


def test_the_rows_beyond_the_limit_do_not_count(start, data):
    limit = "--config.sweep.limit=1"
    assert start(limit)[0] == 0
    edit(data / "prompts.csv", "placeholder two", "another")
    assert start(limit)[0] == 0
    edit(data / "prompts.csv", "placeholder one", "another")
    assert start(limit)[0] == 2


def test_a_prepared_set_that_was_prepared_again_from_other_rows_is_refused(start, data, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    prepared = f"--config.data.directory={tmp_path / 'prepared'}"
    prepare = ["--mode=prepare", f"--config.sweep.datasets.mine={data / 'prompts.csv'}", "--checkpoint=any", prepared]
    assert main.main(prepare) == 0 and start(prepared)[0] == 0 and start(prepared)[0] == 0
    new_pixels(data)
    assert main.main(prepare) == 0
    code, line = start(prepared)
    assert code == 2 and "(mine: 1 changed (b))" in line


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_a_run_that_has_begun_is_refused_with_another_checkpoint(name, start, checkpoint):
    assert start()[0] == 0
    path = checkpoint / name
    content = path.read_bytes()
    changed = content + b"\n" if name.endswith("json") else content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]
    try:
        path.write_bytes(changed)
        code, line = start()
    finally:
        path.write_bytes(content)
    assert code == 2
    assert f"the checkpoints are not those that this run began with (model: 1 changed ({name}))" in line
    assert start()[0] == 0


def test_large_weight_files_are_sampled_over_their_whole_length(tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    (run / "checkpoints").mkdir(parents=True)
    model.mkdir()
    path = model / "model.safetensors"
    size = 64 << 20
    header = b'{"__metadata__":{}}     '
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(size)
    fingerprints.check_checkpoint(run, {"model": model})
    for offset in (8, 8 + len(header), size // 3, size - 1):
        with path.open("r+b") as file:  # what a training step does: no large tensor stays the same
            file.seek(offset)
            file.write(b"\1" * min(2 << 20, size - offset))
        with pytest.raises(UserError, match=re.escape("model: 1 changed (model.safetensors)")):
            fingerprints.check_checkpoint(run, {"model": model})
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(size)
        fingerprints.check_checkpoint(run, {"model": model})


def test_the_training_set_counts_in_align_and_in_train(tmp_path, data, checkpoint, vlm, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_, **__: vlm)
    monkeypatch.setattr(align, "Trainer", lambda *_: pytest.fail("it trains"))
    rows = str(data / "prompts.csv")
    config = config_files.load(
        None,
        [("model.checkpoint", str(checkpoint)), ("data.train", rows), ("sweep.datasets.mine", rows)],
    )
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    common.load_inputs(config, tmp_path / "run", training=True)
    edit(data / "prompts.csv", "placeholder one", "another")
    with pytest.raises(UserError, match=re.escape("(mine: 1 changed (a); train: 1 changed (a))")):
        common.load_inputs(config, tmp_path / "run", training=True)
    with common.claimed(tmp_path / "run", config):
        pass
    monkeypatch.setattr(align, "_require_fields", lambda config: None)
    with pytest.raises(UserError, match=re.escape("(train: 1 changed (a))")):
        align.train(config, tmp_path / "run")


def test_a_sweep_keeps_what_is_known_of_the_training_set(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    row = Example("a", "placeholder", (np.zeros((2, 2, 3), np.uint8),))
    fingerprints.check_rows(tmp_path, {"train": [row], "mine": [row]})
    fingerprints.check_rows(tmp_path, {"mine": [row]})
    assert set(json.loads((tmp_path / "fingerprints.json").read_text())["rows"]) == {"train", "mine"}
    other = Example("a", "placeholder", (np.ones((2, 2, 3), np.uint8),))
    with pytest.raises(UserError, match=r"\(train: 1 changed \(a\)\)"):
        fingerprints.check_rows(tmp_path, {"train": [other], "mine": [row]})


def test_the_seeds_of_one_run_share_their_rows(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    rows = [Example("a", "placeholder")]
    for seed in (1, 2):
        (tmp_path / f"seed_{seed}").mkdir()
    fingerprints.check_rows(tmp_path / "seed_1", {"mine": rows})
    (tmp_path / "seed_1" / "sweeps").mkdir()
    fingerprints.check_rows(tmp_path / "seed_2", {"mine": rows})
    with pytest.raises(UserError, match="1 added"):
        fingerprints.check_rows(tmp_path / "seed_2", {"mine": [*rows, Example("b", "placeholder")]})


def test_export_refuses_other_weights_and_writes_nothing_beside_them(tmp_path, checkpoint, monkeypatch):
    config = config_files.load(None, [("model.checkpoint", str(checkpoint))])
    (tmp_path / "checkpoints").mkdir()
    common.load_model(config, tmp_path, record=False)
    assert not (tmp_path / "fingerprints.json").exists()
    common.load_model(config, tmp_path)
    (checkpoint / "added.json").write_text("{}")
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    try:
        with pytest.raises(UserError, match=re.escape("(model: 1 added (added.json))")):
            common.load_model(config, tmp_path, record=False)
    finally:
        (checkpoint / "added.json").unlink()
