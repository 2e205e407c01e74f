"""The page as a file: complete, alone, and safe with whatever the run's files hold."""

import json
import re
from html.parser import HTMLParser

import pytest

from icet_jax import report
from icet_jax.errors import UserError
from tests.report import synthetic
from tests.report.markup import transcript_data, unpacked

PAYLOAD = '</script><script>alert("x")</script><img src=x onerror=alert(1)>\u202e\u2028'


class Page(HTMLParser):
    """Collects tags, ids and text of a page, and checks that it is well nested."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.attributes, self._open = [], [], [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch):
    """PNG files take long and are looked at by one test."""
    if request.node.name != "test_a_whole_run":
        monkeypatch.setattr("icet_jax.report.figures.write_figures", lambda study, folder: [])


def build(run, **options):
    return report.build(run, **options).read_text(encoding="utf-8")


def test_a_whole_run(tmp_path):
    run = synthetic.write_run(tmp_path / "run")
    text = build(run)
    page = Page(text)
    sections = [
        "safety",
        "groups",
        "utility",
        "transcripts",
        "differences",
        "geometry",
        "training",
        "cost",
        "config",
        "limits",
    ]
    assert [name for name in page.ids if name in sections] == sections
    assert len(page.ids) == len(set(page.ids))
    assert "VQA rows (30%) are rewarded by exact match with the training answers." in text
    assert "no evidence that the hole emerges in real models" in text
    assert {path.name for path in (run / "figures").iterdir()} >= {"forbidden.asr_world_exact.png", "geometry.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "figures").iterdir())


def test_the_page_stands_alone(tmp_path):
    page = Page(build(synthetic.write_run(tmp_path / "run")))
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name != "style"
        if name in ("src", "href"):
            assert value.startswith(("#", "data:"))
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy


@pytest.mark.parametrize("reveal", [False, True])
def test_unsafe_text_is_in_the_page_only_when_asked_for(tmp_path, reveal):
    run = synthetic.write_run(tmp_path / "run")
    page = build(run, reveal_unsafe=reveal)
    assert ("zorbwicket" in unpacked(page)) is reveal
    assert synthetic.REFUSAL in unpacked(page), "the transcripts are read"


@pytest.mark.parametrize("parts", [(), ("transcripts",), ("utility",), ("geometry", "cost"), ("organism", "config")])
@pytest.mark.parametrize("after", [False, True])
def test_missing_parts_are_left_out_and_named(tmp_path, parts, after):
    text = build(synthetic.write_run(tmp_path / "run", after=after, parts=parts))
    page = Page(text)
    assert ("transcripts" in page.ids) is ("transcripts" in parts)
    assert ("geometry" in page.ids) is ("geometry" in parts)
    assert ("Not measured in this run: the model after training." in text) is not after
    assert ("<aside" in text) is ("organism" in parts)


def test_no_text_from_a_file_becomes_markup(tmp_path, monkeypatch):
    monkeypatch.setattr("icet_jax.report.sections.measured.calibrations", dict)  # the note on a judge of one name alone
    run = synthetic.write_run(tmp_path / "run")
    plain = Page(build(run)).tags
    words = [
        "organism/vlm",
        "world_exact",
        "organism_reward",
        "refusal_keywords",
        "llava:",
        "lumo",
        "zorb",
        "sorry",
        "cpu,",
        "train",
        "lppo",
        "jax",
    ]
    for path in [*run.glob("*.json"), *run.glob("sweeps/*.json"), *run.glob("transcripts/*.jsonl")]:
        text = path.read_text()
        for word in words:
            text = text.replace(word, json.dumps(word + PAYLOAD)[1:-1])
        path.write_text(text)
    text = build(run)
    assert Page(text).tags == plain
    assert "<img src=x" not in text
    assert not {"\u202e", "\u2028"} & set(unpacked(text))
    assert any(PAYLOAD[:9] in answer for answer in transcript_data(text)["texts"]), "the page's script shows it as text"
    scripts = re.findall(r"<script([^>]*)>", text)
    assert scripts == [*(f' type="text/plain" id="{name}"' for name in ("transcript-data", "chart-data")), ""]


def test_the_control_says_that_nothing_is_planted(tmp_path):
    run = synthetic.write_run(tmp_path / "run")
    (run / "organism.json").write_text('{"schema": 1, "name": "control", "planted_exits": [], "notes": ["A <note>."]}')
    text = build(run)
    assert "un-planted control" in text
    assert "A &lt;note&gt;." in text
    assert "mark-planted" not in text.split("</style>")[1]


def test_seeds_are_averaged_and_linked(tmp_path):
    for seed in range(3):
        report.build(synthetic.write_run(tmp_path / f"run/seed_{seed}", seed=seed))
    text = build(tmp_path / "run")
    Page(text)
    assert '<a href="seed_2/report.html">seed 2</a>' in text
    assert "range over 3 seeds" in text
    assert "95% interval" not in text.split("</style>")[1].split('id="limits"')[0]


def test_scores_by_exit_have_one_map_per_kind_and_those_of_older_runs_one_for_all(tmp_path):
    run = synthetic.write_run(tmp_path / "run")
    page = build(run)
    maps = [f"exit/*/scores/{kind}" for kind in ("forbidden", "vqa")]
    assert all(f"{name}</code>" in page for name in maps)
    assert "exit/*/scores</code>" not in page and "exit/*/scores/benign" not in page
    older = (run / "metrics.jsonl").read_text().replace("/scores/forbidden", "/scores").splitlines()
    rows = [{name: value for name, value in json.loads(row).items() if "/scores/vqa" not in name} for row in older]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build(run)
    assert "exit/*/scores</code>" in page and "all kinds of rows in one mean" in page
    assert not any(name in page for name in maps)


def test_sparse_and_odd_numbers(tmp_path):
    run = synthetic.write_run(tmp_path / "run", parts=("history", "cost", "geometry"))
    path = run / "sweeps/after.forbidden.json"
    table = json.loads(path.read_text())
    table["layers"] = [table["layers"][6]]
    table["layers"][0]["metrics"]["ts/toxic"] = {"mean": None, "ci95": None, "n_error": 256}
    table["layers"][0]["metrics"]["odd"] = {"mean": 1e9}
    table["groups"] = {}
    path.write_text(json.dumps(table))
    (run / "geometry.json").write_text('{"layers": [{"layer": 1, "cosine": null}, {"layer": 2, "cka": 0.5}, 3]}')
    (run / "cost.json").write_text('{"phases": [{"name": "train"}, 3]}')
    Page(build(run))


def test_a_broken_file_leaves_the_old_report(tmp_path):
    run = synthetic.write_run(tmp_path / "run", parts=())
    old = build(run)
    (run / "sweeps/after.benign.json").write_text("{")
    with pytest.raises(UserError):
        report.build(run)
    assert (run / "report.html").read_text(encoding="utf-8") == old


def test_pages_are_made_without_jax():
    import subprocess
    import sys

    code = "import sys, icet_jax.report.page; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
