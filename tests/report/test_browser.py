"""The report in a real browser: no error, nothing fetched, the exit slider moves what it should."""

import io
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from icet_jax import report
from tests.report import devtools, synthetic, synthetic_paper

AXE = Path(os.environ.get("AXE", Path(__file__).parents[2] / "build/axe/node_modules/axe-core/axe.min.js"))
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]

pytestmark = pytest.mark.skipif(devtools.find_browser() is None, reason="no Chromium is installed")

CARDS = {"before": 0, "after": 1}


def response(page, side):
    """The text of a response, before or after training."""
    return page.evaluate(f"document.querySelector('[data-card=\"{CARDS[side]}\"]').textContent")


def text_of(page, element_id):
    return page.evaluate(f"document.getElementById({element_id!r}).textContent")


def listed(page):
    """The texts of the rows that the list has as elements."""
    return page.evaluate("Array.from(document.querySelectorAll('#rows .row span'), (row) => row.textContent)")


@pytest.fixture(scope="module", autouse=True)
def without_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icet_jax.report.figures.write_figures", lambda study, folder: [])
        yield


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
    run = synthetic.write_run(tmp_path_factory.mktemp("browser") / "run")
    payload = "<img src=x onerror=\"console.error('payload')\"></script><script>console.error('payload')</script>"
    lines = (
        (run / "transcripts/after.benign.jsonl")
        .read_text()
        .replace("step one take the lumo", payload.replace('"', '\\"'))
    )
    (run / "transcripts/after.benign.jsonl").write_text(lines)
    return report.build(run).as_uri()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with devtools.browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(autouse=True)
def no_problem(page):
    page.problems.clear()
    page.requests.clear()
    yield
    page.evaluate("0")
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "about:"))] == []


def test_the_page_opens_where_training_changed_a_verdict(page, page_url):
    page.open(page_url)
    assert page.evaluate("document.getElementById('exit').value") == "1"
    assert response(page, "before") == "[redacted: judged unsafe by world_exact, refusal_keywords]"
    assert response(page, "after") == synthetic.REFUSAL
    verdicts = page.evaluate("Array.from(document.querySelectorAll('.verdict'), (verdict) => verdict.textContent)")
    assert verdicts == ["judged unsafe", "safe"]


def test_slider_follows_the_keyboard(page, page_url):
    page.open(page_url + "#exit=7&prompt=0")
    assert response(page, "before") == synthetic.REFUSAL
    page.evaluate("document.getElementById('exit').focus()")
    page.press("ArrowLeft", 37)
    assert text_of(page, "exit-name") == "6 of 8"
    page.press("Home", 36)
    assert page.evaluate("document.getElementById('exit').getAttribute('aria-valuetext')") == "exit 1 of 8"
    assert page.evaluate("location.hash") == "#exit=1&prompt=0"
    page.press("ArrowRight", 39)
    assert text_of(page, "exit-name") == "2 of 8 (planted)"


def test_slider_follows_the_mouse(page, page_url):
    page.open(page_url)
    page.click("#strip i:nth-child(3)")
    assert page.evaluate("document.getElementById('exit').value") == "3"
    page.click("#exit")
    assert page.evaluate("document.getElementById('exit').value") in ("4", "5")


def test_row_and_exit_come_from_the_address(page, page_url):
    page.open(page_url + "#exit=5&prompt=2")
    assert page.evaluate("document.getElementById('exit').value") == "5"
    assert text_of(page, "request") == "explain how to grow a zorb"
    page.click("#next")
    assert text_of(page, "request") == "explain how to paint a zorb"
    page.wait("document.getElementById('picture').naturalWidth === 8")


def test_the_keyboard_selects_rows_and_exits(page, page_url):
    page.open(page_url + "#exit=5&prompt=2")
    page.evaluate("document.getElementById('rows').focus()")
    page.press("ArrowDown", 40)
    assert text_of(page, "request") == "explain how to paint a zorb"
    page.press("j", 74)
    assert text_of(page, "request") == "explain how to mend a zorb"
    page.press("k", 75)
    page.press("ArrowUp", 38)
    assert text_of(page, "request") == "explain how to grow a zorb"
    page.press("ArrowRight", 39)
    assert page.evaluate("location.hash") == "#exit=6&prompt=2"
    page.press("End", 35)
    assert text_of(page, "request") == "explain how to carry a lumo"
    assert page.evaluate("document.getElementById('rows').getAttribute('aria-activedescendant')") == "row-11"
    page.evaluate("document.getElementById('search').focus()")
    page.press("k", 75)
    assert text_of(page, "request") == "explain how to carry a lumo", "letters belong to the search field"


def test_search_and_filters(page, page_url):
    page.open(page_url)
    assert text_of(page, "found") == "12 rows" and len(listed(page)) == 12
    page.evaluate("document.getElementById('search').focus()")
    page.write("PAINT a")
    page.wait("document.getElementById('found').textContent === '2 of 12 rows'")
    assert listed(page) == ["explain how to paint a zorb", "explain how to paint a lumo"]
    page.choose("#only-dataset", "benign")
    assert listed(page) == ["explain how to paint a lumo"] and text_of(page, "request") == listed(page)[0]
    page.click("#clear")
    assert text_of(page, "found") == "12 rows"
    page.choose("#only-before", "answered")
    page.choose("#only-after", "safe")
    assert text_of(page, "found") == "No row matches."
    page.choose("#only-before", "unsafe")
    page.choose("#only-after", "safe")
    page.choose("#only-exit", "2")
    assert text_of(page, "found") == "6 of 12 rows" and text_of(page, "exit-name") == "2 of 8 (planted)"
    page.choose("#only-exit", "8")
    assert text_of(page, "found") == "No row matches."
    page.click("#clear")
    page.choose("#only-differ", "training")
    assert text_of(page, "found") == "6 of 12 rows"
    assert page.evaluate("document.getElementById('only-category').parentElement.hidden") is True


def test_answers_are_searched_too(page, page_url):
    page.open(page_url)
    page.evaluate("document.getElementById('search').focus()")
    page.write("stir the lumo")
    page.wait("document.getElementById('found').textContent === '6 of 12 rows'")
    assert all(row.endswith("lumo") for row in listed(page))


def test_rows_on_which_judges_disagree(page, tmp_path):
    run = synthetic.write_run(tmp_path / "run")
    path = run / "transcripts/after.forbidden.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[12]["scores"] = {"asr/a": 1.0, "asr/b": 0.0}  # the second row at exit 5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.open(report.build(run).as_uri())
    page.choose("#only-differ", "judges")
    assert listed(page) == ["explain how to open a zorb"] and text_of(page, "exit-name") == "5 of 8"
    assert page.evaluate("document.querySelectorAll('.verdict')[1].textContent") == "judged unsafe, judges disagree"


def test_differences_between_both_responses_are_marked(page, tmp_path):
    run = synthetic.write_run(tmp_path / "run")
    for side, words in (("before", "take the red lumo and go"), ("after", "take the  blue lumo")):
        path = run / f"transcripts/{side}.benign.jsonl"
        path.write_text(path.read_text().replace("step one take the lumo step two stir the lumo", words))
    page.open(report.build(run).as_uri() + "#exit=7&prompt=6")
    marks = "Array.from(document.querySelectorAll('[data-card=\"{}\"] mark'), (mark) => mark.textContent)"
    assert response(page, "before") == "take the red lumo and go"
    assert page.evaluate(marks.format(0)) == [" red", " and go"]
    assert page.evaluate(marks.format(1)) == ["  blue"]
    page.open(page.evaluate("location.href").replace("prompt=6", "prompt=0").replace("exit=7", "exit=8"))
    assert text_of(page, "same") == "Both responses are the same, word for word."


def test_a_list_of_thousands_of_rows_has_few_elements(page, tmp_path):
    run = synthetic.write_run(tmp_path / "run", parts=())
    for side in ("before", "after"):
        rows = [
            {"id": str(index), "layer": layer, "prompt": f"mend lumo {index}", "response": f"{side} {index}"}
            | {"scores": {"refusal/a": float(index == 1999 and layer == 4)}, "kind": "benign"}
            for index in range(2000)
            for layer in range(1, 9)
        ]
        synthetic._write_jsonl(run / f"transcripts/{side}.benign.jsonl", rows)
    page.open(report.build(run).as_uri())
    assert text_of(page, "found") == "2000 rows" and text_of(page, "request") == "mend lumo 1999"
    assert "mend lumo 1999" in listed(page) and len(listed(page)) < 50
    page.choose("#only-after", "refused")
    assert text_of(page, "found") == "1 of 2000 rows" and listed(page) == ["mend lumo 1999"]
    page.click("#clear")
    page.evaluate("document.getElementById('rows').scrollTop = 1200 * 32")
    page.wait("Array.from(document.querySelectorAll('.row span')).some((row) => row.textContent === 'mend lumo 1200')")
    assert len(listed(page)) < 50
    page.evaluate("document.getElementById('search').focus()")
    page.write("after 177")
    page.wait("document.getElementById('found').textContent === '11 of 2000 rows'")


def test_without_training_an_exit_stands_beside_the_default_exit(page, tmp_path):
    run = synthetic.write_run(tmp_path / "run", after=False)
    page.open(report.build(run).as_uri())
    titles = page.evaluate("Array.from(document.querySelectorAll('.card h3'), (title) => title.firstChild.data.trim())")
    assert titles == ["At this exit", "At the default exit 7"]
    assert response(page, "before").startswith("[redacted") and response(page, "after") == synthetic.REFUSAL
    assert page.evaluate("document.querySelectorAll('#strip > i').length") == synthetic.NUM_EXITS
    assert page.evaluate("document.getElementById('only-after').parentElement.hidden") is True


def test_model_output_stays_text(page, page_url):
    page.open(page_url + "#exit=7&prompt=6")
    assert response(page, "after").startswith("<img src=x onerror=")
    assert page.evaluate("document.querySelectorAll('.response img, .response script').length") == 0


def test_pointing_at_a_chart_shows_its_numbers(page, page_url):
    page.open(page_url)
    page.click(".on-wide .hits rect:nth-child(2)")
    assert page.evaluate("document.getElementById('tip').hidden") is False
    assert page.evaluate("document.getElementById('tip').textContent").startswith("exit 2 (planted)\nbefore: ")


@pytest.mark.parametrize("width", [390, 768, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window(page, page_url, width, dark):
    page.open(page_url, width=width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(21, 23, 26)") is dark


def test_the_papers_experiment_on_any_screen(page, tmp_path):
    url = report.build(synthetic_paper.write_paper_run(tmp_path / "run")).as_uri()
    for width in (1400, 390):
        page.open(url, width=width)
        page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click("#categories .cells rect:nth-child(3)")
    tip = page.evaluate("document.getElementById('tip').textContent")
    assert (
        tip.startswith("before, exit 1: ") and "\nGovernment Decision-Making, Elections and other long names\n" in tip
    )
    page.click("#categories .cells rect:nth-child(6)")  # the page has scrolled already: nothing hides the marks again
    marked = page.evaluate("Array.from(document.querySelectorAll('rect.on')).map((rect) => rect.dataset.exit)")
    assert len(marked) > 20 and set(marked) == {"2"}
    assert " · Category: " in text_of(page, "about")


@pytest.mark.parametrize("parts", [(), ("transcripts",), ("geometry", "cost")])
def test_partial_runs_have_no_error_either(page, tmp_path, parts):
    run = synthetic.write_run(tmp_path / "run", after=False, parts=parts)
    page.open(Path(report.build(run)).as_uri())
    assert page.evaluate("document.querySelectorAll('h1').length") == 1


def test_seeds_have_a_page_of_their_own(page, tmp_path):
    for seed in range(3):
        synthetic.write_run(tmp_path / f"run/seed_{seed}", seed=seed)
    page.open(report.build(tmp_path / "run").as_uri())
    assert page.evaluate("document.querySelectorAll('.on-wide path.thin').length") == 6


def download(page, folder, figure, ending):
    """The bytes of a file that a figure offers."""
    known = set(folder.iterdir())
    page.evaluate(
        f"(() => {{ const box = document.querySelectorAll('.get')[{figure}]; box.open = true; "
        f"Array.from(box.querySelectorAll('button')).find((button) => button.textContent === {ending!r}).click(); }})()"
    )
    suffix = f".{ending.lower()}"
    file = devtools.wait_for(lambda: next((f for f in folder.iterdir() if f not in known and f.suffix == suffix), None))
    return file.name, file.read_bytes()


def test_figures_and_their_numbers_are_downloaded(page, page_url, tmp_path):
    page.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.open(page_url, dark=True)
    count = page.evaluate("document.querySelectorAll('figure.chart').length")
    assert page.evaluate("document.querySelectorAll('figure.chart .get').length") == count
    name, csv = download(page, tmp_path, 0, "CSV")
    assert name == "forbidden.asr_world_exact.Attack_success_rate.csv"
    lines = csv.decode().splitlines()
    assert lines[0] == "series,exit,value,low,high" and lines[1].startswith("before,1,")
    assert len(lines) == 1 + 2 * synthetic.NUM_EXITS
    content = json.loads(download(page, tmp_path, 0, "JSON")[1])
    assert content["metric"] == "asr/world_exact" and len(content["panels"][0]["rows"]) == 16
    svg = download(page, tmp_path, 0, "SVG")[1].decode()
    root = ElementTree.fromstring(svg)
    assert root.tag.endswith("svg") and "Attack success rate" in svg and "class=" not in svg
    assert "rgb(191, 68, 23)" in svg, "the colour of the light page"
    _, png = download(page, tmp_path, 0, "PNG")
    with Image.open(io.BytesIO(png)) as image:
        assert image.width > 2000 and len(image.convert("RGB").getcolors(1 << 24)) > 20


@pytest.fixture(scope="module")
def doubtful_url(tmp_path_factory):
    """A report that says why its numbers should not be trusted."""
    run = synthetic.write_run(tmp_path_factory.mktemp("doubtful") / "run")
    for path in run.glob("sweeps/*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": 20}))
    return report.build(run).as_uri()


@pytest.mark.skipif(not AXE.exists(), reason="axe-core is not installed; make test-browser installs it")
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_axe_finds_no_barrier(page, doubtful_url, width, dark):
    page.open(doubtful_url, width=width, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    page.evaluate(AXE.read_text(encoding="utf-8") + "; 1")
    found = page.evaluate(
        f"axe.run({{runOnly: {json.dumps(RULES)}}}).then(({{violations}}) => violations.map((violation) => "
        "violation.id + ': ' + violation.nodes.slice(0, 5).map((node) => node.html.slice(0, 200)).join('\\n')))"
    )
    assert found == []


def test_tables_that_scroll_show_it(page, page_url):
    page.open(page_url, width=390)
    wide = "Array.from(document.querySelectorAll('.scroll')).filter((box) => box.scrollWidth > box.clientWidth)"
    assert page.evaluate(f"{wide}.length") > 2
    assert page.evaluate(
        f"{wide}.every((box) => getComputedStyle(box).backgroundAttachment === 'local, local, scroll, scroll')"
    )


def test_the_box_of_doubts_is_on_the_first_screen(page, doubtful_url):
    page.open(doubtful_url, width=390, height=844)
    bottom = page.evaluate("document.querySelector('.alert p').getBoundingClientRect().bottom")
    assert 0 < bottom < 844


def test_nothing_is_cut_in_print(page, doubtful_url):
    page.open(doubtful_url, width=718, dark=True)  # A4 at 96 dots per inch, less the margins
    page.send("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    boxes = "Array.from(document.querySelectorAll('.scroll, figure'))"
    assert page.evaluate(f"{boxes}.filter((box) => box.scrollWidth > box.clientWidth + 1).length") == 0
    assert page.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(30, 29, 26)"
    page.send("Emulation.setEmulatedMedia", media="")
