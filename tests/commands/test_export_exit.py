"""`--mode=export --exit=L`: of a run or of a checkpoint, with a card; and what is refused."""

import json

import numpy as np
import pytest

import icet_jax
from icet_jax import main
from tests import tiny, tiny_families
from tests.commands.test_export import a_run, start_adapter


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save_llava(tmp_path_factory.mktemp("checkpoint"))


def export(*arguments):
    return main.main(["export", *map(str, arguments)])


def table_at_exits(metric_at_exits):
    """A sweep file with one metric at exits 1, 2, ..."""
    layers = [
        {"layer": layer, "n": 40, "metrics": {"asr/judge": {"mean": mean, "ci95": [0.0, 0.5], "n": 40}}}
        for layer, mean in enumerate(metric_at_exits, start=1)
    ]
    return {"schema": 1, "kind": "forbidden", "num_exits": 4, "default_exit": 3, "layers": layers, "groups": {}}


@pytest.mark.parametrize("rank", [4, 0], ids=["adapters", "full"])
def test_one_exit_of_a_run_is_the_trained_policy_at_that_exit(tmp_path, directory, rank, capsys):
    run = tmp_path / "run"
    policy, _ = a_run(run, directory, rank, **({"export.form": "adapter"} if rank else {}))
    (run / "sweeps").mkdir()
    for side, means in (("before", [0.8, 0.6, 0.1, 0.3]), ("after", [0.2, 0.04, 0.0, 0.1])):
        (run / "sweeps" / f"{side}.forbidden.json").write_text(json.dumps(table_at_exits(means)))
    assert export(f"--workdir={run}", "--exit=2") == 0
    assert f"{run / 'hf_exit_2'}: exit 2 of 4 alone after iteration 3 of 94" in capsys.readouterr().err
    assert not (run / "hf").exists()
    exported = icet_jax.load(run / "hf_exit_2")
    assert (exported.num_exits, exported.default_exit) == (2, 2)
    inputs = tiny.batch(tiny.llava_config(), [1, 0, 2])
    real = inputs["attention_mask"] == 1
    expected = np.asarray(policy.logits(inputs, 2))[real]
    np.testing.assert_allclose(np.asarray(exported.logits(inputs))[real], expected, atol=1e-5)
    assert not (run / "hf_exit_2" / "value_head.safetensors").exists()

    card = (run / "hf_exit_2" / "README.md").read_text()
    assert "These files hold exit 2 alone" in card and "exits 1 to 2" in card
    results = card.split("## Measured at exit 2")[1].split("\n## ")[0]
    assert "Measured in the run run with the whole model at exit 2" in results
    assert "| Attack success rate: asr/judge | 60.0% → 4.0% |" in results
    assert "80" not in results and "PEFT" not in card


def test_a_card_says_that_nothing_was_measured_at_the_exit(tmp_path, directory):
    a_run(tmp_path / "run", directory, 2)
    assert export(f"--workdir={tmp_path / 'run'}", "--exit=4", f"--out={tmp_path / 'last'}") == 0
    assert "## Measured at exit 4\n\nNot measured." in (tmp_path / "last" / "README.md").read_text()
    assert icet_jax.load(tmp_path / "last").default_exit == 4


def test_one_exit_of_a_checkpoint_with_an_adapter(tmp_path, directory, capsys):
    adapter = start_adapter(tmp_path / "adapter", directory)
    out = tmp_path / "cut"
    arguments = (f"--checkpoint={directory}", f"--config.model.adapter={adapter}", "--exit=1", f"--out={out}")
    assert export(*arguments) == 0
    assert f"{out}: exit 1 of 4 alone of {directory}" in capsys.readouterr().err
    inputs = tiny.batch(tiny.llava_config(), [1, 0, 2])
    real = inputs["attention_mask"] == 1
    expected = np.asarray(icet_jax.load(directory, adapter=adapter).logits(inputs, 1))[real]
    np.testing.assert_allclose(np.asarray(icet_jax.load(out).logits(inputs))[real], expected, atol=1e-5)
    card = (out / "README.md").read_text()
    assert "Nothing was measured for this export." in card and "exits 1 to 1" in card
    assert "4 exits, of which the whole model reads number 3" in card and "with the adapter adapter merged" in card
    assert str(directory) not in card and directory.name in card
    assert export(*arguments) == 0, "an earlier export is replaced"
    assert export(f"--checkpoint={out}", "--exit=1", f"--out={tmp_path / 'again'}") == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def refusal(capsys, *arguments):
    """The one line that the command prints."""
    assert export(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_what_is_refused_is_one_line(tmp_path, directory, capsys):
    checkpoint, out = f"--checkpoint={directory}", f"--out={tmp_path / 'cut'}"
    for number in (0, -1, 5):
        line = f"--exit: exit {number} is out of range; this model has exits 1..4"
        assert line in refusal(capsys, checkpoint, f"--exit={number}", out)
    for word in ("abc", "2.5", "all", "1,2", ""):
        line = f"--exit={word}: give one exit, a whole number such as 12"
        assert line in refusal(capsys, checkpoint, f"--exit={word}")
    assert "needs --out, the folder to write" in refusal(capsys, checkpoint, "--exit=2")
    both = refusal(capsys, checkpoint, "--exit=2", f"--workdir={tmp_path}")
    assert "give --workdir (a run) or --checkpoint (any model), not both" in both
    assert "needs --workdir, the run directory whose model is exported or --checkpoint" in refusal(capsys, "--exit=2")
    assert "(or --checkpoint, with --exit)" in refusal(capsys, checkpoint, out)
    same = refusal(capsys, checkpoint, "--exit=2", f"--out={directory}")
    assert "the model was loaded from this directory; export to another one" in same
    mllama = tiny_families.save_mllama(tmp_path / "mllama", processor=False)
    line = refusal(capsys, f"--checkpoint={mllama}", "--exit=2", out)
    assert line.startswith("icet-jax: --exit: Llama 3.2 Vision has no files with one exit alone")
    assert not (tmp_path / "cut").exists()


def test_the_exit_of_a_run_is_checked_before_its_weights_are_read(tmp_path, directory, capsys):
    run = tmp_path / "run"
    a_run(run, directory, 2)
    capsys.readouterr()
    for path in directory.glob("*.safetensors"):
        copy = path.rename(path.with_suffix(".away"))
    try:
        line = refusal(capsys, f"--workdir={run}", "--exit=9")
    finally:
        copy.rename(copy.with_suffix(".safetensors"))
    assert "--exit: exit 9 is out of range; this model has exits 1..4" in line


@pytest.mark.parametrize("mode", ["ask", "sweep", "verify", "align"])
def test_other_modes_have_no_exit(mode, directory, capsys):
    assert main.main([mode, f"--checkpoint={directory}", "--exit=2"]) == 2
    assert "--exit is for --mode=export only" in capsys.readouterr().err
