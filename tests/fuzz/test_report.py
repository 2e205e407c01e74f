"""Run directories with damaged files, and with files whose text wants to be markup."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from icet_jax import report
from tests.fuzz.damage import as_json, cases, files, mutated, outcome, torn
from tests.report import synthetic
from tests.report.test_page import Page

HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


@pytest.fixture(autouse=True)
def without_figures(monkeypatch):
    monkeypatch.setattr("icet_jax.report.figures.write_figures", lambda study, folder: [])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    run = synthetic.write_run(tmp_path_factory.mktemp("report") / "run")
    for path in run.glob("transcripts/*.jsonl"):  # two prompts at every exit are enough here
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: 2 * synthetic.NUM_EXITS]))
    return run


def names(run):
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*.json*"))


def content(path):
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def lines(rows):
    return b"".join(as_json(row) + b"\n" for row in rows) if isinstance(rows, list) else as_json(rows)


def entry(mean):
    return {"mean": mean, "ci95": [0.0, 1.0], "n_error": 0}


LAYERS = [{"layer": layer, "n": 4, "metrics": {"asr/x": entry(0.5), "tr/y": entry(-1.0)}} for layer in (1, 2)]
SWEEP = {
    "schema": 1, "model": "m", "dataset": "d", "kind": "forbidden", "num_exits": 2, "default_exit": 2,
    "exit_definition": "e", "seed": 0, "generation": {"temperature": 0.0}, "layers": LAYERS,
    "groups": {name: {"layers": [1, 2], "metrics": {"asr/x": entry(0.5)}} for name in ("early", "late", "average")},
    "policies": {"p": LAYERS}, "worst_exit": {"asr/x": {"layer": 1, **entry(0.5)}},
    "any_exit": {"asr_any/x": entry(0.5)},
    "formats": {"f": {"layers": LAYERS, "worst_exit": {"asr/x": {"layer": 1, **entry(0.5)}}}},
    "transferred": {"yes": {"layers": LAYERS}},
}  # fmt: skip


def test_sweeps(tmp_path):
    """The whole page of two sweeps, and nothing else."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "after.d.json").write_bytes(as_json(SWEEP))
    path = tmp_path / "sweeps" / "before.d.json"
    path.write_bytes(as_json(SWEEP))
    assert outcome(report.build, tmp_path)[1] is None

    @cases(40)
    @given(files(SWEEP))
    def holds(content):
        path.write_bytes(content)
        page, _ = outcome(report.build, tmp_path)
        assert page is None or not HIDDEN.search(page.read_text(encoding="utf-8"))

    holds()


def test_damaged_files(pristine):
    originals = {name: (pristine / name).read_bytes() for name in names(pristine)}

    @cases(12, part=1000)
    @given(st.data())
    def holds(data):
        name = data.draw(st.sampled_from(sorted(originals)))
        path = pristine / name
        value = content(path)
        damage = mutated(value).map(lines) | torn(originals[name]) if path.suffix == ".jsonl" else files(value)
        path.write_bytes(data.draw(damage))
        try:
            page, _ = outcome(report.build, pristine)
            if page is not None:
                text = page.read_text(encoding="utf-8")
                Page(text)
                assert not HIDDEN.search(text)
        finally:
            path.write_bytes(originals[name])

    holds()


@pytest.mark.parametrize("field", ["num_exits", "default_exit"])
@pytest.mark.parametrize("value", [10**9, 0, -1, 10**400, "8", [8], True])
def test_numbers_of_exits_are_bounded(pristine, field, value):
    path = pristine / "sweeps" / "before.forbidden.json"
    original = path.read_bytes()
    path.write_bytes(as_json(content(path) | {field: value}))
    try:
        assert field in outcome(report.build, pristine)[1]
    finally:
        path.write_bytes(original)


HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"' onmouseover=alert(1) x='",
    "<!--",
    "-->",
    "]]>",
    "<svg onload=alert(1)>",
    "javascript:alert(1)",
    "\u202egnp.exe",
    "\u2028",
    "\u2029",
    "\u2066",
    "\u200b",
    "\ufeff",
    "\0",
    "\x1b[31m",
    "\ud800",
    "&lt;b&gt;",
    "&#60;b&#62;",
    "</style><style>*{}",
    "<base href=//x>",
    "\u00ad",
    "\r\n",
    "<a href=x>",
    "`${alert(1)}`",
)


def test_hostile_text_stays_text(pristine):
    originals = {name: (pristine / name).read_bytes() for name in names(pristine)}
    words = (
        "organism/vlm",
        "world_exact",
        "refusal_keywords",
        "llava:",
        "lumo",
        "zorb",
        "sorry",
        "train",
        "lppo",
        "jax",
    )

    @cases(4, part=1000)
    @given(
        st.lists(st.sampled_from(HOSTILE), min_size=1, max_size=3).map("".join),
        st.sets(st.sampled_from(words), min_size=1),
    )
    def holds(payload, chosen):
        # The same names with harmless letters: a judge of another name has no published agreement with people.
        plain = page_with("x", chosen)
        text = page_with(payload, chosen)
        shown = Page(text)
        assert shown.tags == Page(plain).tags and not HIDDEN.search(text)
        assert not any(name.startswith("on") or name == "style" for name, _ in shown.attributes)

    def page_with(suffix, chosen):
        """Returns the report of a run in whose files the chosen words have a suffix."""
        try:
            for name, original in originals.items():
                text = original.decode()
                for word in sorted(chosen):
                    text = text.replace(word, word + json.dumps(suffix)[1:-1])
                (pristine / name).write_text(text)
            page, line = outcome(report.build, pristine)
            assert line is None
            return page.read_text(encoding="utf-8")
        finally:
            for name, original in originals.items():
                (pristine / name).write_bytes(original)

    holds()
