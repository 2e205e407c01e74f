"""Pages that follow from the code are not stale."""

import re
import subprocess
import sys

from icet_jax.config import defaults, flatten
from scripts import config_reference
from tests.docs.blocks import ROOT

EMITTED = (*sorted((ROOT / "icet_jax/algorithms").glob("*.py")), ROOT / "icet_jax/training/stability.py")


def test_the_configuration_reference_is_what_the_code_says():
    assert config_reference.main(["--check"]) == 0, "type: python scripts/config_reference.py"


def test_a_stale_reference_is_said_so(monkeypatch, tmp_path, capsys):
    page = tmp_path / "config.md"
    monkeypatch.setattr(config_reference, "PAGE", page)
    page.write_text(config_reference.render().replace("0.95", "0.96"), encoding="utf-8")
    assert config_reference.main(["--check"]) == 1
    assert "is stale; type: python scripts/config_reference.py" in capsys.readouterr().err
    config_reference.main([])
    assert config_reference.main(["--check"]) == 0


def test_every_field_is_in_the_reference_with_default_and_meaning():
    page = config_reference.render()
    for name in flatten(defaults.default()):
        row = re.search(rf"^\| `{re.escape(name)}` \| (.*) \| (.*) \| (.*) \| .* \|$", page, re.MULTILINE)
        assert row and all(cell.strip() for cell in row.groups()), name
    assert "| `lppo.lam` | `0.95` | between 0 and 1 | GAE's lambda. | TRL |" in page
    assert "| `lppo.kl_target` | `6.0` nats per sequence | above 0 | " in page
    assert "| `data.mixture` | `forbidden`: `1.0` | a share, 0 or more; keys are forbidden, benign, vqa | " in page
    assert page.index("`lppo.gamma`") < page.index("`lppo.lam`") < page.index("## `lsft`")
    assert "`configs/llava_next_lppo.py` | `:13b`, `:mistral`, `:mixed`, `:best`, `:smoke` |" in page


def test_the_guide_names_every_metric_that_training_writes():
    text = "\n".join(file.read_text(encoding="utf-8") for file in EMITTED)
    written = set(re.findall(r'"((?:objective|policy|loss|val|train|perf)/[a-z_]+[a-z])"', text))
    pattern = r"`((?:objective|policy|loss|val|train|perf)/\w+)`"
    guide = set(re.findall(pattern, (ROOT / "docs/guides/lppo.md").read_text("utf-8")))
    made = {f"perf/time_{phase}" for phase in ("rollout", "score", "update")} | {"perf/mfu_rollout", "perf/mfu_update"}
    assert len(written) > 25
    assert written - guide == set()
    assert guide - written == made, "names put together from parts of the code are listed here"


def test_the_script_runs_by_itself():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/config_reference.py", "--check"],
        cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
