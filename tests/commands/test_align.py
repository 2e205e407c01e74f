"""The whole loop on a toy: what it writes, what it compiles, and how it stops."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import icet_jax
from icet_jax import main as front_door
from icet_jax.errors import UserError
from tests.runs import smoke


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run; and of each compilation how many iterations had their metrics written, and the program's name."""
    workdir = tmp_path_factory.mktemp("runs") / "smoke"
    compilations = []

    def listen(event, *_, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            written = workdir / "metrics.jsonl"
            compilations.append((written.read_bytes().count(b"\n") if written.exists() else 0, fun_name))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        # Every iteration draws its own exits.
        assert front_door.main(smoke.arguments(workdir, lppo__exits="per_batch", log__tensorboard="true")) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return workdir, compilations


def test_it_leaves_a_whole_run_directory(finished):
    workdir, _ = finished
    for name in (
        "config.json",
        "metrics.jsonl",
        "cost.json",
        "data.json",
        "fingerprints.json",
        "utility.json",
        "geometry.json",
        "encoder.json",
        "report.html",
    ):
        assert (workdir / name).stat().st_size > 0, name
    for phase in ("before", "after", "difference"):
        for dataset in ("forbidden", "benign"):
            table = json.loads((workdir / "sweeps" / f"{phase}.{dataset}.json").read_text())
            assert [layer["layer"] for layer in table["layers"]] == [1, 23]
    utility = json.loads((workdir / "utility.json").read_text())
    assert all("vqa" in utility[phase] for phase in ("before", "after", "difference"))
    assert any(path.name.startswith("events.") for path in workdir.iterdir())
    phases = [phase["name"] for phase in json.loads((workdir / "cost.json").read_text())["phases"]]
    assert phases[:4] == ["sweep_before", "utility", "geometry", "train"]
    assert phases[4:] == ["merge", "sweep_after", "export", "export_check"]


def test_metrics_have_the_names_that_users_know(finished):
    workdir, _ = finished
    history = smoke.rows(workdir)
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    expected = {
        *(f"objective/{name}" for name in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores", "kl_coef")),
        *(f"policy/{name}" for name in ("approxkl_avg", "clipfrac_avg", "entropy_avg")),
        *(f"loss/{name}" for name in ("policy_avg", "value_avg")),
        *(f"val/{name}" for name in ("ratio", "ratio_var", "ratio_max", "clipfrac_avg", "num_eos_tokens", "truncated")),
        *(f"val/{name}" for name in ("explained_variance", "advantages_std", "returns_std", "sampler_ess")),
        *(f"objective/scores/{kind}" for kind in ("forbidden", "vqa")),
        *(f"perf/{name}" for name in ("samples_per_sec", "tokens_per_sec", "time_rollout", "time_update")),
        *(f"perf/{name}" for name in ("tokens_per_sec_rollout", "tokens_per_sec_update", "mfu_rollout", "mfu_update")),
        "objective/asr_refusal_keywords",
    }
    for row in history:
        assert expected <= set(row)
        assert 0 < row["perf/mfu_update"] < 1 and 0 < row["perf/mfu"] < 1
        layers = {name.split("/")[1] for name in row if name.startswith("exit/")}
        assert len(layers) == 1 and 1 <= int(layers.pop()) <= 24
    assert history[0]["objective/kl"] == 0.0


def test_drawing_other_exits_compiles_nothing_after_the_first_iteration(finished):
    workdir, compilations = finished
    drawn = {name for row in smoke.rows(workdir) for name in row if name.endswith("/kl") and name.startswith("exit/")}
    assert len(drawn) > 1
    phases = "sample", "prepare_columns", "learn"
    assert {phase for phase in phases for written, name in compilations if phase in name and not written} == {*phases}
    later = [(written, name) for written, name in compilations if 0 < written < 6]
    assert not [name for written, name in later if written > 1 or any(phase in name for phase in phases)], later


def test_the_export_is_the_model_that_was_measured(finished):
    workdir, _ = finished
    before = icet_jax.load(workdir / "toy" / "llava15")
    after = icet_jax.load(workdir / "hf")
    inputs = after.processor(images=[np.zeros((28, 28, 3), np.uint8)], prompts=["placeholder"])
    assert np.abs(np.asarray(after.logits(inputs, 5) - before.logits(inputs, 5))).max() > 0


def test_answers_of_the_written_files_are_those_that_were_measured(finished):
    workdir, _ = finished
    check = json.loads((workdir / "export_check.json").read_text())
    # Two sets of 2 rows at 2 exits are all there is.
    assert (check["n"], check["n_equal"], check["different"], check["passed"]) == (8, 8, [], True)
    assert "8 of 8 answers" in (workdir / "hf" / "README.md").read_text()
    assert "it gave 8 of 8 answers again as they were measured" in (workdir / "report.html").read_text()


def test_a_damaged_export_ends_the_run_until_it_is_written_again(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    arguments = smoke.arguments(workdir, lppo__exits="per_batch", log__tensorboard="true")
    weights, check = workdir / "hf" / "model.safetensors", workdir / "export_check.json"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    # As if the run was killed between writing and checking, and the disk then lost one tensor.
    tensors["language_model.lm_head.weight"] = np.roll(tensors["language_model.lm_head.weight"], 7, axis=0)
    save_file(tensors, weights, metadata={"format": "pt"})
    check.unlink()
    for _ in range(2):  # a failed check is made again
        assert front_door.main(arguments) == 2
        printed = capsys.readouterr().err.splitlines()[-1]
        assert printed.startswith(f"icet-jax: {workdir / 'hf'}: loaded from its files, the model gives other answers")
        content = json.loads(check.read_text())
        assert not content["passed"] and content["n_equal"] + len(content["different"]) == 8
        assert set(content["different"][0]) == {"dataset", "row", "exit"}
    shutil.rmtree(workdir / "hf")
    assert front_door.main(arguments) == 0
    assert weights.read_bytes() == whole and json.loads(check.read_text())["passed"]


def test_training_in_python_goes_on_where_the_command_stopped_and_gives_what_it_exported(finished):
    workdir, _ = finished
    history = (workdir / "metrics.jsonl").read_bytes()
    settings = smoke.SETTINGS | {"lppo.exits": "per_batch", "log.tensorboard": "true"}
    policy = icet_jax.train(icet_jax.load_config(smoke.CONFIG, settings), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == history and policy.lora is not None
    exported = icet_jax.load(workdir / "hf")
    inputs = policy.processor(images=[np.zeros((28, 28, 3), np.uint8)], prompts=["placeholder"])
    before, after, expected = (
        np.asarray(model.logits(inputs, 5)) for model in (policy.with_weights(policy.params), policy, exported)
    )
    moved, rounding = np.abs(after - before).max(), np.abs(after - expected).max()
    assert rounding < 0.01 * moved, "adapters beside the weights, and added to them"
    with pytest.raises(UserError, match="config.seeds: one run per seed"):
        icet_jax.train(icet_jax.load_config(smoke.CONFIG, settings | {"seeds": (0, 1)}), workdir)
    with pytest.raises(UserError, match="holds a run of another config: lppo.iterations"):
        icet_jax.train(icet_jax.load_config(smoke.CONFIG, settings | {"lppo.iterations": 7}), workdir)


def test_the_same_command_on_a_finished_run_does_nothing_again(finished, capsys):
    workdir, compilations = finished
    kept = {path: path.read_bytes() for path in (workdir / "sweeps").glob("*.json")}
    history = (workdir / "metrics.jsonl").read_bytes()
    assert front_door.main(smoke.arguments(workdir, lppo__exits="per_batch", log__tensorboard="true")) == 0
    assert {path: path.read_bytes() for path in kept} == kept
    assert (workdir / "metrics.jsonl").read_bytes() == history


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(tmp_path, capsys):
    # The warm-up's first step is 0, the second spoils the weights, and the second iteration meets them.
    explosive = {"optimizer__learning_rate": "1e30", "optimizer__warmup_steps": "9", "optimizer__max_grad_norm": "0"}
    arguments = smoke.arguments(tmp_path / "run", **explosive, sweep__utility="{}", sweep__exits="23")
    assert front_door.main(arguments) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("icet-jax: iteration 2: the loss or its gradient is NaN")
    saved = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert saved == [1] and [row["step"] for row in smoke.rows(tmp_path / "run")] == [1]
    assert not (tmp_path / "run" / "hf").exists() and not (tmp_path / "run" / "report.html").exists()


def test_lsft_runs_on_several_seeds_and_reports_over_all(tmp_path):
    workdir = tmp_path / "seeds"
    longer = {"lppo__max_new_tokens": "48", "lsft__iterations": "3"}  # the refusal is 36 bytes
    arguments = smoke.arguments(
        workdir, algorithm="lsft", seeds="3,5", **longer, sweep__utility="{}", sweep__exits="23"
    )
    assert front_door.main(arguments) == 0
    assert "it gave 8 of 8 answers over 2 seeds again" in (workdir / "report.html").read_text()
    for seed in (3, 5):
        stored = json.loads((workdir / f"seed_{seed}" / "config.json").read_text())
        assert (stored["seed"], stored["seeds"]) == (seed, [])
        assert (workdir / f"seed_{seed}" / "report.html").exists()
        assert json.loads((workdir / f"seed_{seed}" / "export_check.json").read_text())["passed"]
        losses = [row["loss/total_avg"] for row in smoke.rows(workdir / f"seed_{seed}")]
        assert len(losses) == 3 and np.isfinite(losses).all()
    first, second = (
        json.loads((workdir / f"seed_{s}" / "sweeps" / "before.forbidden.json").read_text()) for s in (3, 5)
    )
    assert first == second


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lppo__fixed_exit": "25"}, "config.lppo.fixed_exit names exit 25, but this model's exits are 1 to 24"),
        ({"sweep__exits": "1,99"}, "config.sweep.exits names exit 99"),
        ({"data__train": "nothing.csv"}, "nothing.csv"),
        ({"data__train": "toy:vqa"}, "the training data has no 'benign' rows"),
        ({"data__max_prompt_tokens": "8"}, "no row fits: 192 of 192 prompts are longer than the 8 positions"),
        ({"reward__model": "none"}, "config.reward.model is not set"),
        ({"reward__model": "refusal_keywords"}, "is a judge (asr), not a reward model"),
        ({"model__checkpoint": "toy:llava16"}, "toy:llava16: no such toy checkpoint"),
        ({"sweep__scorers": "no/such/judge"}, "no/such/judge"),
        ({"warm_start": "lsfft"}, "nor the directory of a run (with config.json); did you mean lsft?"),
        ({"warm_start": "runs/none"}, "config.warm_start=runs/none: neither an algorithm (lppo, lsft, "),
        ({"warm_start": "lppo"}, "config.warm_start=lppo is config.algorithm itself: raise config.lppo.iterations"),
        ({"warm_start": "lrloo", "lrloo__group_size": "3"}, "does not divide into groups of 3 (lrloo.group_size)"),
        ({"algorithm": "lsft", "warm_start": "lppo", "reward__model": "none"}, "config.reward.model is not set"),
        ({"mesh__data": "7"}, "config.mesh.data=7: mesh (data=7, fsdp=1, tensor=1) does not fit 1 device"),
    ],
)
def test_bad_input_is_one_line_before_any_work(changes, says, tmp_path, capsys):
    assert front_door.main(smoke.arguments(tmp_path / "run", **changes)) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("icet-jax: ") and says in printed
    assert not (tmp_path / "run" / "sweeps").exists()
