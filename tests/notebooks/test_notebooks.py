"""The notebooks run from an empty folder, show what their prose says, and hold the outputs of their own code."""

import json
import re

import pytest

from scripts import notebooks

pytest.importorskip("nbclient")
LARGEST = 300 * 1024  # bytes

# Run after the notebook's own cells: what its prose claims, of its variables.
CLAIMS = {
    "ask": """
assert all(text.startswith("step") for text in (answers[layer][0] for layer in (1, 2, 3)))
assert answers[vlm.default_exit][0].startswith("sorry")
assert {texts[1] for texts in answers.values()} == {rows[1].answer}
assert refusal["forbidden"][1].mean() < 0.1 < 0.9 < refusal["forbidden"][vlm.default_exit - 1].mean()
assert refusal["allowed"].mean() < 0.1
""",
    "sweep_and_lppo": """
assert len(history) == 16 and aligned.lora is not None and vlm.lora is None
assert worst["before"] == 1.0 and worst["after"] < 0.35
default = vlm.default_exit
assert before["forbidden"].curve("asr/world_exact")[default].mean < 0.05
assert after["vqa"].curve("accuracy/vqa_exact")[default].mean > 0.7
assert max(point.mean for point in after["benign"].curve("refusal/world_exact").values()) < 0.3
""",
    "convert_and_verify": """
assert has_torch and same == len(source) and again.keys() == source.keys()
assert {name.split(".")[-2] for name in touched} == {"q_proj", "v_proj"} and len(touched) == 8
assert rounding < 0.01 * moved
""",
}


def read(name):
    return json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())


def test_every_notebook_is_tried():
    assert notebooks.names() == sorted([*CLAIMS, *notebooks.NEEDS])  # tests/examples/test_real_notebook.py


@pytest.mark.parametrize("name", notebooks.NEEDS)
def test_outputs_that_depend_on_the_reader_s_files_are_not_stored(name):
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in read(name)["cells"])


def test_a_notebook_whose_files_are_missing_is_left_out(monkeypatch, capsys):
    monkeypatch.delenv("ICET_REAL_BUILD", raising=False)
    monkeypatch.setattr("sys.argv", ["notebooks.py", "--only=real_model"])
    monkeypatch.setattr(notebooks, "execute", lambda *_: pytest.fail("it was run"))
    assert notebooks.main() == 0
    assert "left out, because ICET_REAL_BUILD is not set" in capsys.readouterr().out


@pytest.mark.parametrize("name", CLAIMS)
def test_it_runs_and_shows_what_it_says(name, monkeypatch):
    if name == "sweep_and_lppo":  # it trains, which takes longer than compiling
        monkeypatch.delenv("XLA_FLAGS")
    notebook = notebooks.execute(name, [CLAIMS[name]])
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "Traceback" not in text and "FAIL" not in text and "IProgress not found" not in text


@pytest.mark.parametrize("name", CLAIMS)
def test_what_is_shown_was_made_by_its_code(name):
    notebook = read(name)
    assert notebook["metadata"][notebooks.SOURCE_MARK] == notebooks.digest(notebook), "scripts/notebooks.py --write"
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    assert (notebooks.FOLDER / f"{name}.ipynb").stat().st_size < LARGEST
    shown = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|var|opt)/", shown), "paths of one machine"


def test_changed_code_is_noticed():
    notebook = read("ask")
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    before = notebooks.digest(notebook)
    cell["outputs"] = []
    assert notebooks.digest(notebook) == before
    cell["source"] += ["\n1"]
    assert notebooks.digest(notebook) != before
