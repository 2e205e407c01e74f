"""The form of the pages: short lines, a short README, an architecture page that agrees with the import contracts."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from scripts import diagrams
from tests.docs import blocks
from tests.docs.blocks import ROOT

LONGEST_LINE = 120
README_LINES = 150
OTHERS_LINES = {
    "docs/ablations.md": "being measured",
}
PAGES = [page for page in blocks.pages() if str(page.relative_to(ROOT)) not in OTHERS_LINES]


def long_prose(text):
    """Numbers of the lines of prose that are too long; code, tables, link targets and pictures do not count."""
    return [
        number
        for number, line in enumerate(blocks.outside_blocks(text), start=1)
        if not line.startswith(("|", "```", "![")) and len(re.sub(r"\]\([^)\s]*\)", "]", line)) > LONGEST_LINE
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_of_prose_are_short(page):
    assert long_prose(page.read_text(encoding="utf-8")) == []


def test_a_long_line_of_prose_is_found_and_tables_code_and_targets_are_not():
    long = "word " * 30
    link = f"[{'a' * 100}]({'b' * 100})"
    text = f"short\n{long}\n| {long} |\n\n```sh\n{long}\n```\n{link}\n- {long}\n"
    assert long_prose(text) == [2, 9]


@pytest.mark.parametrize("page", blocks.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_avoid_the_words_that_the_glossary_replaces(page):
    text = page.read_text(encoding="utf-8").partition("## Words to replace")[0]
    assert re.findall(r"\b(?:mend(?:s|ed|ing)?|the house|front door|rooms)\b", text, re.IGNORECASE) == []


@pytest.mark.parametrize("page", blocks.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_has_marks_of_an_unresolved_conflict(page):
    assert not re.search(r"^(<{7}|>{7}) ", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES
    assert [line for line in lines if len(line) > LONGEST_LINE] == []


def listed_packages(page):
    """The packages of a page's first table, in its order."""
    rows = re.findall(r"^\| `([\w.]+?)(?:/|\.py)` \|", page, re.MULTILINE)
    assert rows, "a row begins with `package/` or `module.py`"
    return rows


def assert_same_order(names, layers):
    """`names` holds every package once, in the order of `layers`; those of one layer may stand in any order."""
    names = list(names)
    for layer in layers:
        head, names = names[: len(layer)], names[len(layer) :]
        assert sorted(head) == sorted(layer)
    assert names == []


def test_the_architecture_page_lists_the_packages_in_the_order_that_import_linter_checks():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## What a model offers")[0]
    assert_same_order(listed_packages(page), diagrams.layers())


def test_the_diagram_shows_the_packages_in_the_order_that_import_linter_checks():
    picture = ElementTree.fromstring(diagrams.packages_svg())
    texts = [element for element in picture.iter() if element.get("class") == "package"]
    names = [name for element in texts for name in element.text.split(", ")]
    heights = [int(element.get("y")) for element in texts]
    assert_same_order(names, diagrams.layers())
    assert heights == sorted(heights)


def test_every_package_is_in_the_contract():
    modules = {
        path.stem for path in (ROOT / "icet_jax").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert {name for layer in diagrams.layers() for name in layer} == modules - {"__init__"}


def test_the_diagrams_are_what_the_script_draws(monkeypatch, tmp_path, capsys):
    assert diagrams.main(["--check"]) == 0, "type: python scripts/diagrams.py"
    monkeypatch.setattr(diagrams, "IMAGES", tmp_path)
    assert diagrams.main(["--check"]) == 1
    assert "type: python scripts/diagrams.py" in capsys.readouterr().err
    diagrams.main([])
    assert diagrams.main(["--check"]) == 0


def test_the_glossary_has_every_word_once():
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").partition("## Words to replace")[0]
    words = [word.strip() for cell in re.findall(r"^\| \*\*(.+?)\*\*", page, re.MULTILINE) for word in cell.split(",")]
    assert len(words) > 80
    assert sorted(words) == sorted(set(words))


def test_the_glossary_s_tables_are_in_order():
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8").partition("## Words to replace")[0]
    for table in page.split("\n## ")[1:]:
        words = [word.lower() for word in re.findall(r"^\| \*\*(.+?)\*\*", table, re.MULTILINE)]
        assert words == sorted(words)
