"""The site of docs/ is built without a warning, and needs nothing that is elsewhere."""

import re
import subprocess
import sys

import pytest
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files

import icet_jax
from scripts import docs_hooks
from tests.docs.blocks import ROOT


def build(config, target):
    """(exit code, what was said) of a strict build; with --quiet mkdocs counts no warnings."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "--site-dir", str(target)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    code, said = build(ROOT / "mkdocs.yml", target)
    assert code == 0, said
    return target


def test_the_site_is_built_and_every_page_is_in_it(site):
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (site / f"{name}.html").is_file(), name
    assert (site / "launch" / "index.html").is_file()
    for notebook in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        assert (site / "notebooks" / f"{notebook.stem}.html").is_file(), notebook
    assert not list(site.rglob("*.ipynb"))


def test_a_notebook_becomes_a_page_with_what_its_code_printed_and_drew():
    cells = [
        {"cell_type": "markdown", "source": ["# Top\n", "text"]},
        {
            "cell_type": "code",
            "source": ["print(1)"],
            "outputs": [
                {"output_type": "stream", "text": ["\x1b[1mone\x1b[0m\n"]},
                {"output_type": "display_data", "data": {"image/png": "QUJD\n", "text/plain": ["<Figure>"]}},
            ],
        },
        {"cell_type": "code", "source": [""], "outputs": []},
    ]
    assert docs_hooks.notebook_page({"cells": cells}) == (
        "# Top\ntext\n\n```python\nprint(1)\n```\n\n```text\none\n```\n\n"
        '<img alt="what this cell draws" src="data:image/png;base64,QUJD">\n'
    )


def test_reports_that_are_present_are_in_the_site_and_linked(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_hooks, "ROOT", tmp_path)
    report = next(iter(docs_hooks.REPORTS))
    text = f"Before.\n\n<!-- report: {report} -->\n\nAfter."
    assert docs_hooks.report_links(text, "gallery.md") == "Before.\n\n\n\nAfter."
    (tmp_path / report).parent.mkdir(parents=True)
    (tmp_path / report).write_text("<!doctype html>")
    assert f"[Open the report]({docs_hooks.REPORTS[report]})" in docs_hooks.report_links(text, "gallery.md")
    assert f"[Open the report](../{docs_hooks.REPORTS[report]})" in docs_hooks.report_links(text, "guides/demo.md")
    config = MkDocsConfig()
    config.load_dict({"site_name": "test", "docs_dir": str(tmp_path), "use_directory_urls": False})
    config.validate()
    config.plugins._current_plugin = "hooks"  # as mkdocs sets it while it calls a hook
    paths = [file.src_uri for file in docs_hooks.on_files(Files([]), config)]
    assert docs_hooks.REPORTS[report] in paths and len(paths) == 1 + len(docs_hooks.OUTSIDE)


def test_the_gallery_names_every_report():
    page = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- report: (\S+) -->", page) == list(docs_hooks.REPORTS)


def test_nothing_is_fetched_from_elsewhere(site):
    loaded = re.compile(r"<(?:script|link|img|iframe)[^>]*\s(?:src|href)=[\"']?(https?:)?//", re.IGNORECASE)
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8").replace('rel="canonical"', "")
        assert not loaded.search(text), page
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8"), style


def test_pages_and_their_search_work_from_a_file(site):
    text = (site / "guides" / "machines.html").read_text(encoding="utf-8")
    assert 'src="../javascripts/iframe-worker.js"' in text and (site / "javascripts/iframe-worker.js").is_file()
    assert (site / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = {")
    folders = re.compile(r'href="(?![a-z]+:)[^"#]*/(?:#[^"]*)?"')  # a browser would list the folder
    for page in site.rglob("*.html"):
        found = folders.search(page.read_text(encoding="utf-8"))
        assert found is None or page.name == "404.html", (page, found)


def test_no_page_names_the_machine_that_it_was_made_on(site):
    for page in site.rglob("*.html"):
        assert "site-packages" not in page.read_text(encoding="utf-8"), page


def test_the_reference_has_the_python_surface_with_its_arguments(site):
    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in (
        *icet_jax.SURFACE.values(),
        "vlm.VLM.generate",
        "algorithms.losses.policy_loss",
        "scorers.base.Scorer",
    ):
        assert f'id="icet_jax.{name}"' in text, name
    assert "max_new_tokens" in text
    assert not re.search(r'id="icet_jax[\w.]*\._\w', text), "private names are no part of the reference"


@pytest.mark.parametrize(
    "text", ["[a](gone.md)", "[a](index.md#no-such-heading)", "[a](../gone.py)", "::: icet_jax.gone"]
)
def test_a_page_that_leads_nowhere_fails_the_build(tmp_path, text):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Top\n\n{text}\n", encoding="utf-8")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    settings |= {"docs_dir": str(docs), "nav": [{"Home": "index.md"}], "hooks": [], "theme": {"name": "mkdocs"}}
    settings["plugins"].remove("offline")  # which belongs to the site's theme
    config = tmp_path / "mkdocs.yml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    code, said = build(config, tmp_path / "site")
    assert code != 0 and text.strip("[a]().: ").removeprefix("index.md#") in said


def test_links_that_leave_docs_become_pages_or_names():
    links = docs_hooks.site_links
    assert links("[x](../launch/README.md#will-it-fit)", "performance.md") == "[x](launch/README.md#will-it-fit)"
    assert links("[x](../../launch/README.md)", "guides/machines.md") == "[x](../launch/README.md)"
    assert links("[x](../docs/scaling.md)", "launch/README.md") == "[x](../scaling.md)"
    assert links("[the file](../icet_jax/main.py)", "data.md") == "the file (`icet_jax/main.py`)"
    assert (
        links("[a](data.md#b) ![c](../d.png) [e](https://f.g)", "x.md")
        == "[a](data.md#b) ![c](../d.png) [e](https://f.g)"
    )
    assert links("[x](../notebooks/ask.ipynb)", "guides/data.md") == "[x](../notebooks/ask.md)"
    assert links("[x](../gone.py)", "data.md") == "[x](../gone.py)"
