"""PNG files beside the page."""

import json

from icet_jax.report.figures import write_figures
from icet_jax.report.load import load_runs
from icet_jax.report.study import Study
from tests.report import synthetic, synthetic_paper


def test_seeds_of_which_one_lacks_a_metric(tmp_path):
    for seed in range(2):
        run = synthetic.write_run(tmp_path / f"run/seed_{seed}", seed=seed, parts=("organism",))
        for path in run.glob("sweeps/*.benign.json"):
            path.unlink()
        for path in run.glob("sweeps/*.json"):
            table = json.loads(path.read_text())
            for layer in table["layers"]:
                kept = ("asr/world_exact",) if seed else ("asr/world_exact", "length")
                layer["metrics"] = {name: layer["metrics"][name] for name in kept}
            path.write_text(json.dumps(table))
    written = write_figures(Study(load_runs(tmp_path / "run")), tmp_path / "figures")
    assert [path.name for path in written] == ["forbidden.asr_world_exact.png", "forbidden.length.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_shares_by_policy_have_a_figure(tmp_path):
    run = synthetic_paper.write_paper_run(tmp_path / "run", after=False)
    for path in run.glob("sweeps/*.json"):
        table = json.loads(path.read_text())
        for layer in table["layers"]:
            layer["metrics"] = {
                name: value for name, value in layer["metrics"].items() if name == synthetic_paper.JUDGES[0]
            }
        path.write_text(json.dumps(table)) if "mini" in path.name else path.unlink()
    (run / "utility.json").unlink()
    names = [path.name for path in write_figures(Study(load_runs(run)), run / "figures")]
    assert names == ["mini.asr_llama_guard_3_8b.png", "mini.asr_llama_guard_3_8b.policies.png"]


def test_names_are_safe_file_names(tmp_path):
    run = synthetic.write_run(tmp_path / "run", after=False, parts=())
    (run / "sweeps/before.benign.json").unlink()
    path = run / "sweeps/before.forbidden.json"
    table = json.loads(path.read_text())
    for layer in table["layers"]:
        layer["metrics"] = {"asr/../../x y": layer["metrics"]["asr/world_exact"]}
    path.write_text(json.dumps(table))
    written = write_figures(Study(load_runs(run)), run / "figures")
    assert [file.name for file in written] == ["forbidden.asr_.._.._x_y.png"]
    assert written[0].parent == run / "figures"
