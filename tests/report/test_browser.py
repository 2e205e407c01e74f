"""The report in a real browser: no error, nothing fetched, the exit slider moves what it should."""

from pathlib import Path

import pytest

from icet_jax import report
from tests.report import devtools, synthetic, synthetic_paper

pytestmark = pytest.mark.skipif(devtools.find_browser() is None, reason="no Chromium is installed")

TEXT = "document.querySelector('[data-side=\"{}\"]').textContent"


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


def test_slider_follows_the_keyboard(page, page_url):
    page.open(page_url)
    assert page.evaluate("document.getElementById('exit').value") == str(synthetic.DEFAULT_EXIT)
    assert page.evaluate(TEXT.format("before")) == synthetic.REFUSAL
    page.evaluate("document.getElementById('exit').focus()")
    page.press("ArrowLeft", 37)
    assert page.evaluate("document.getElementById('exit-name').textContent") == "6 of 8"
    page.press("Home", 36)
    assert page.evaluate("document.getElementById('exit').getAttribute('aria-valuetext')") == "exit 1 of 8"
    assert page.evaluate(TEXT.format("before")) == "[redacted: judged unsafe by world_exact, refusal_keywords]"
    assert page.evaluate(TEXT.format("after")) == synthetic.REFUSAL
    assert page.evaluate("location.hash") == "#exit=1&prompt=0"
    page.press("ArrowRight", 39)
    assert page.evaluate("document.getElementById('exit-name').textContent") == "2 of 8 (planted)"


def test_slider_follows_the_mouse(page, page_url):
    page.open(page_url)
    page.click("#strip i:nth-child(3)")
    assert page.evaluate("document.getElementById('exit').value") == "3"
    page.click("#exit")
    assert page.evaluate("document.getElementById('exit').value") in ("4", "5")


def test_prompt_and_exit_come_from_the_address(page, page_url):
    page.open(page_url + "#exit=5&prompt=2")
    assert page.evaluate("document.getElementById('exit').value") == "5"
    assert page.evaluate("document.getElementById('request').textContent") == "explain how to grow a zorb"
    page.click("#next")
    assert page.evaluate("document.getElementById('request').textContent") == "explain how to paint a zorb"
    assert page.evaluate("document.getElementById('picture').naturalWidth") == 8


def test_model_output_stays_text(page, page_url):
    page.open(page_url + "#exit=7&prompt=6")
    assert page.evaluate(TEXT.format("after")).startswith("<img src=x onerror=")
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
    assert page.evaluate("document.getElementById('category').textContent").startswith("Category: ")


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
