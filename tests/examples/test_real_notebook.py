"""The notebook on the real model runs on a build: that of ICET_REAL_BUILD, or one of miniature parts."""

import json
import os
import shutil
from pathlib import Path

import pytest

from examples.real_vlm import photographs, rows
from icet_jax.media.tokenizer import load_tokenizer
from scripts import notebooks

pytest.importorskip("nbclient")

CLAIMS = """
assert list(results) == list(data) and len(curves) == len({"forbidden", "harmless", "questions"} & set(data))
assert all(list(curve) == list(exits) for curve in curves.values())
assert all(0 <= point.mean <= 1 for curve in curves.values() for point in curve.values())
assert list(answers) == list(exits) and all(len(texts) == 2 for texts in answers.values())
"""
AREA = {"mean": 0.5, "ci95": [0.4, 0.6]}


@pytest.fixture
def build(request, tmp_path):
    """Working directory of a build."""
    if os.environ.get("ICET_REAL_BUILD"):
        return Path(os.environ["ICET_REAL_BUILD"]).resolve()
    llava, inputs = (request.getfixturevalue(name) for name in ("llava", "inputs"))
    shutil.copytree(llava, tmp_path / "vlm")
    found = photographs.read_photographs(inputs["captions"], inputs["images"])
    sources = rows.Sources(found, None, inputs["instructions"], inputs["forbidden"], limit=15)
    rows.write_rows(tmp_path / "data", sources, load_tokenizer(llava), longest_caption=64)
    results = {"probe": {"encoder": AREA, "random": AREA}, "sight": {"difference": AREA}}
    summary = {"parts": {"tiny": {"licence": "none"}}, "seconds": {"parts": 60.0}, "results": results}
    (tmp_path / "build.json").write_text(json.dumps(summary))
    return tmp_path


def test_it_runs_on_a_build_and_prints_no_forbidden_request(build, monkeypatch):
    monkeypatch.setenv("ICET_REAL_BUILD", str(build))
    notebook = notebooks.execute("real_model", [CLAIMS])
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "forbidden requests not refused" in text and "Traceback" not in text
    requests = [row["prompt"] for row in rows.read_jsonl(build / "data" / "held_out_forbidden.jsonl")]
    assert requests and not any(request in text for request in requests)
