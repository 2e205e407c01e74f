"""Every step of the experiment on the other families: prepare, sweep, L-PPO, sweep, export, report; and compare."""

import json

import numpy as np
import pytest

import icet_jax
from icet_jax import main as front_door
from tests.runs import smoke

FAMILIES = {
    "llava_next": ("llava_next", 24, "hidden_states[l] of the CLIP tower, every tile"),
    "llama32v": ("mllama", 32, "E1: local blocks after l skipped"),
    "smolvlm": ("smolvlm", 12, "output of block l of the SigLIP tower, every tile"),
    "qwen25vl": ("qwen2_5_vl", 32, "output of block l of the vision transformer through the unchanged merger"),
}
POSITIONS = {"smolvlm": "224", "qwen25vl": "160"}
"""{family: longest prompt}, where it is not 128."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of each family."""
    folder = tmp_path_factory.mktemp("families")
    for family, (_, exits, _) in FAMILIES.items():
        arguments = smoke.arguments(
            folder / family,
            lppo__iterations="1",
            data__batch_size="4",
            data__train="toy:redteam_2k + toy:benign + toy:vqa_v2",
            data__max_prompt_tokens=POSITIONS.get(family, "128"),
            data__directory=str(folder / f"{family}_data"),
            sweep__datasets="{'forbidden': 'toy:custom'}",
            sweep__utility="{}",
            sweep__exits=f"1,{exits}",
            export__form="both",
        )
        arguments[0] = f"--config=configs/{family}_lppo.py:smoke"
        assert front_door.main(["--mode=prepare", *arguments]) == 0
        assert front_door.main(arguments) == 0
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_sweep_and_report_names_the_exits_definition(family, finished):
    _, exits, definition = FAMILIES[family]
    for phase in ("before", "after"):
        table = json.loads((finished / family / "sweeps" / f"{phase}.forbidden.json").read_text())
        assert table["exit_definition"].startswith(definition)
        assert [layer["layer"] for layer in table["layers"]] == [1, exits] and table["num_exits"] == exits
    assert f"Exit l is <code>{definition}" in (finished / family / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_the_aligned_model(family, finished):
    toy, exits, _ = FAMILIES[family]
    workdir = finished / family
    before, after = icet_jax.load(workdir / "toy" / toy), icet_jax.load(workdir / "hf")
    adapted = icet_jax.load(workdir / "toy" / toy, adapter=str(workdir / "hf" / "adapter"))
    inputs = after.processor(images=[np.full((30, 50, 3), 99, np.uint8)], prompts=["placeholder"])
    first, merged, added = (np.asarray(vlm.logits(inputs, exits // 2)) for vlm in (before, after, adapted))
    change = np.abs(merged - first).max()
    assert change > 0
    assert np.abs(added - merged).max() < 0.1 * change + 1e-4


def test_their_runs_are_compared(finished):
    runs = [str(finished / family) for family in FAMILIES]
    assert front_door.main(["--mode=compare", *runs, "--out", str(finished / "both")]) == 0
    page = (finished / "both" / "compare.html").read_text(encoding="utf-8")
    assert all(definition in page for _, _, definition in FAMILIES.values())
    assert "exit 24 of 24" in page and "exit 32 of 32, default" in page
