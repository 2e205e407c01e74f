"""The ablations: setups that the configs can express, sweeps of the split asked for, and runs that resume."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import icet_jax
from icet_jax.algorithms.settings import from_config
from icet_jax.generation.sampling import Sampling
from icet_jax.organism import world

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "ablations.py"


@pytest.fixture(scope="module")
def ablations():
    spec = importlib.util.spec_from_file_location("ablations", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config_of(ablations):
    return lambda name, split="val": icet_jax.load_config(
        ablations.ALL[name].config, ablations.settings(name, split, 0)
    )


def optimizer(config):
    return from_config(config, Sampling(max_new_tokens=1)).optimizer


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_setup_is_a_config_that_measures_the_split_asked_for(ablations, config_of, split):
    differing = set()
    for name in ablations.ALL:
        config = config_of(name, split)
        sources = [*config.sweep.datasets.to_dict().values(), *config.sweep.utility.to_dict().values()]
        assert [source.split(":")[1] for source in sources] == [split] * 3
        assert config.data.train == "organism:train"
        differing.add(json.dumps(config.to_dict()))
    assert len(differing) == len(ablations.ALL), "two setups are the same run"


def test_the_value_head_is_clipped_with_the_policy_not_at_all_or_apart(config_of):
    for schedule in ("stratified", "per_batch"):
        joint, no_clip, apart = (config_of(f"{schedule}{ending}") for ending in ("", "_no_clip", "_apart"))
        assert {config.lppo.exits for config in (joint, no_clip, apart)} == {schedule}
        for config, norm in ((joint, 1.0), (no_clip, 0.0)):
            one = optimizer(config)
            assert one.max_grad_norm == norm
            assert (one.value_learning_rate, one.value_max_grad_norm, one.value_warmup_steps) == (None, None, None)
        two = optimizer(apart)
        assert two.max_grad_norm == 1.0 and two.value_max_grad_norm == 1.0
        assert two.value_learning_rate != two.learning_rate and two.value_warmup_steps != two.warmup_steps


def test_settings_tried_and_guards_differ_from_the_main_job_in_nothing_else(config_of):
    tried = {
        (config.optimizer.learning_rate, config.reward.normalise)
        for config in map(
            config_of, ("stratified", "lr_2.5e-4", "lr_1e-3", "lr_2.5e-4_raw", "reward_raw_scale", "lr_1e-3_raw")
        )
    }
    assert tried == {(rate, normalised) for rate in (2.5e-4, 5e-4, 1e-3) for normalised in (True, False)}
    for off, on in (("stratified", "guards"), ("lr_1e-3_constant", "lr_1e-3_constant_guards")):
        values = [config_of(name).lppo.to_dict() for name in (off, on)]
        assert {key for key in values[0] if values[0][key] != values[1][key]} == {"dual_clip", "target_kl", "max_ratio"}


def test_what_is_said_of_the_rows_is_so(ablations):
    for split in ("val", "test"):
        for kind, said in ablations.swept(split).items():
            rows = world.examples(split, kind, said["rows"])
            assert len(rows) == said["rows"] == len({row.images[0].tobytes() for row in rows})
            if kind != "vqa":
                assert len({row.prompt for row in rows}) == said["distinct_requests"]
    assert ablations.swept("val")["forbidden"]["distinct_requests"] == 86


def begun(folder, config, mark):
    """A run directory with its sweeps before training, whose files say `mark`."""
    (folder / "sweeps" / "utility").mkdir(parents=True)
    (folder / "transcripts").mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "fingerprints.json").write_text(mark)
    for name in ("before.forbidden", "before.benign", "utility/before.vqa"):
        (folder / "sweeps" / f"{name}.json").write_text(mark)
        (folder / "transcripts" / f"{Path(name).name}.jsonl").write_text(mark)


def test_what_was_measured_before_training_is_copied_from_a_run_of_the_same_sweeps_alone(
    ablations, config_of, tmp_path
):
    def take(name):
        folder = tmp_path / name / "seed_1"
        ablations.copy_sweep_before(folder, tmp_path, ablations.ALL[name].config, ablations.settings(name, "val", 1))
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    begun(tmp_path / "a" / "seed_0", config_of("stratified", "test"), "of another split")
    begun(tmp_path / "b" / "seed_0", config_of("train_at_1"), "of fewer rows")
    assert take("guards") == []
    begun(tmp_path / "c" / "seed_0", config_of("stratified"), "right")
    assert len(take("guards")) == 7 and not (tmp_path / "guards" / "seed_1" / "config.json").exists()
    assert {path.read_text() for path in (tmp_path / "guards").rglob("*.json*")} == {"right"}
    begun(tmp_path / "lr_1e-3" / "seed_1", config_of("lr_1e-3"), "its own")
    take("lr_1e-3")
    assert {path.read_text() for path in (tmp_path / "lr_1e-3").rglob("before*")} == {"its own"}


def finished(folder, asr):
    """A run directory as the main job leaves it, with `asr` at every exit."""

    def sweep(**metrics):
        return json.dumps({"layers": [{"metrics": {name: {"mean": mean} for name, mean in metrics.items()}}] * 8})

    (folder / "sweeps").mkdir(parents=True)
    for when in ("before", "after"):
        forbidden = {"asr/refusal_keywords": asr, "asr/world_exact": asr, "degenerate/text_rules": 0.0}
        benign = {"accuracy/benign_exact": 1.0, "refusal/refusal_keywords": 0.0, "degenerate/text_rules": 0.01}
        (folder / "sweeps" / f"{when}.forbidden.json").write_text(sweep(**forbidden))
        (folder / "sweeps" / f"{when}.benign.json").write_text(sweep(**benign))
    vqa = {"vqa": json.loads(sweep(**{"accuracy/vqa_exact": 0.8}))}
    (folder / "utility.json").write_text(json.dumps({"before": vqa, "after": vqa}))
    (folder / "cost.json").write_text(json.dumps({"phases": [{"name": "train", "seconds": 3.0}]}))
    rows = [{"policy/early_stop": 1.0, "val/ratio_max": ratio, "train/grad_norm": 2.0} for ratio in (1.5, 40.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "report.html").write_text("")


def script(*flags, **options):
    command = [sys.executable, str(SCRIPT), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT, **options)


def test_finished_runs_are_left_alone_and_every_split_has_its_own_numbers(tmp_path):
    for split, asr in (("val", 0.25), ("test", 0.5)):
        finished(tmp_path / split / "guards" / "seed_0", asr)
        done = script("--out", str(tmp_path), "--split", split, "--only", "guards", "--seeds", "0")
        assert done.returncode == 0 and "icet_jax.main" not in done.stdout, done.stderr[-2000:]
        assert f"| guards | 1 | {100 * asr:.1f} | {100 * asr:.1f} | 0.0 | 1.0 | 0.0 | 0.0 | 0.0 |" in done.stdout
        assert "| guards | 1 | 2 | - | 2 | 40 | - |" in done.stdout
    found = json.loads((tmp_path / "ablations.json").read_text())
    assert [found[split]["guards"]["0"]["asr"][0] for split in ("val", "test")] == [25.0, 50.0]
    assert found["setups"]["guards"]["overrides"] == {
        "lppo.dual_clip": 3.0,
        "lppo.target_kl": 0.1,
        "lppo.max_ratio": 100.0,
    }
    assert found["rows"]["val"]["forbidden"] == {"rows": 256, "distinct_requests": 86}


@pytest.mark.parametrize(
    ("flags", "said"), [(["--only", "guard"], "there is no setup 'guard'"), (["--seeds", "0,one"], "--seeds=0,one")]
)
def test_a_wrong_flag_is_one_line(tmp_path, flags, said):
    done = script("--out", str(tmp_path), *flags)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_a_stop_reaches_the_job_and_is_told(ablations, tmp_path):
    """What comes while the job saves its work is not lost, though the job itself then ends well."""
    job = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); print('up', flush=True); time.sleep(60)"
    code = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import ablations\n"
    code += f"sys.exit(ablations.run_job([sys.executable, '-c', {job!r}]))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "up\n"
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=30) == 75
