"""Renders reports and comparisons as HTML pages. A page is one file that contains its own style and script."""

import base64
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from icet_jax.files import write_text_atomic
from icet_jax.report import blocks, figures
from icet_jax.report.blocks import Block, Header, Section
from icet_jax.report.charts.data import figure_data
from icet_jax.report.charts.marks import COLOURS, SELECTORS, STYLES, TONES
from icet_jax.report.charts.svg import svg
from icet_jax.report.comparison import Comparison, load_comparison
from icet_jax.report.loading import load_runs
from icet_jax.report.packing import compress
from icet_jax.report.sections import (
    categories,
    cost,
    deployment,
    differences,
    formats,
    geometry,
    groups,
    header,
    judges,
    limits,
    measured,
    method,
    numbers,
    paper,
    runs,
    training,
    transcripts,
)
from icet_jax.report.study import Study
from icet_jax.report.text import visible


def build_report(run_dir: Path, *, reveal_unsafe: bool = False) -> Path:
    """Writes `report.html` and its figures; see `icet_jax.report.build`."""
    study = Study(load_runs(run_dir))
    page = run_dir / "report.html"
    write_text_atomic(page, render_report(study, run_dir, reveal_unsafe=reveal_unsafe))
    figures.write_figures(study, run_dir / "figures")
    return page


def build_comparison(run_dirs: Sequence[Path], out: Path) -> Path:
    """Writes `compare.html` and its figures; see `icet_jax.report.compare_runs`."""
    comparison = load_comparison(run_dirs)
    page = out / "compare.html"
    write_text_atomic(page, render_comparison(comparison))
    figures.write_comparison_figures(comparison, out / "figures")
    return page


def render_report(study: Study, run_dir: Path, *, reveal_unsafe: bool) -> str:
    """Returns the HTML of a run's report, which names `run_dir`.

    With `reveal_unsafe`, the page also contains the text of responses that a judge called unsafe.
    """
    return _document(header.of_study(study, run_dir), [
        Section("safety", "Safety at every exit", measured.safety_of_study(study)),
        Section("categories", "Which requests get through where", categories.of_study(study)),
        Section("formats", "Which attack formats get through", formats.of_study(study)),
        Section("groups", "Early, middle, late", groups.of_study(study)),
        Section("paper", "Beside the paper’s Table 2", paper.of_study(study)),
        Section("utility", "Over-refusal and utility", measured.utility_of_study(study)),
        Section("deployment", "Which exit to deploy", deployment.of_study(study)),
        Section("transcripts", "What the model said", transcripts.of_study(study, reveal_unsafe=reveal_unsafe)),
        Section("differences", "Before and after on the same prompts", differences.of_study(study)),
        Section("judges", "Who judged", judges.of_study(study)),
        Section("geometry", "How far each exit lies from the default", geometry.of_study(study)),
        Section("training", "Training", [*method.of_study(study), *training.of_study(study)]),
        Section("cost", "Cost", cost.of_study(study)),
        Section("config", "Configuration", training.config_of_study(study)),
        Section("limits", "What these numbers do not say", limits.of_study(study)),
    ])  # fmt: skip


def render_comparison(comparison: Comparison) -> str:
    """Returns the HTML of a comparison, with a line or a row for each run; it contains no responses."""
    return _document(header.of_comparison(comparison), [
        Section("runs", "What is compared", runs.of_comparison(comparison)),
        Section("methods", "Methods, what they reach and what they cost", method.of_comparison(comparison)),
        Section("safety", "Safety over relative depth", measured.safety_of_comparison(comparison)),
        Section("utility", "Over-refusal and utility", measured.utility_of_comparison(comparison)),
        Section("groups", "Early, middle, late", groups.of_comparison(comparison)),
        Section("geometry", "How far each exit lies from the default", geometry.of_comparison(comparison)),
        Section("numbers", "All numbers", numbers.of_comparison(comparison)),
        Section("limits", "What these numbers do not say", limits.of_comparison(comparison)),
    ])  # fmt: skip


def _document(top: Header, sections: Sequence[Section]) -> str:
    """Returns the HTML of a page with the data of its charts; sections without blocks are left out."""
    shown = [section for section in sections if section.blocks]
    charts = [figure_data(figure) for section in shown for figure in blocks.figures(section.blocks)]
    light = {name: colour.light for name, colour in COLOURS.items()}
    data = compress({"figures": charts, "colours": light}) if charts else ""
    return environment().get_template("document.html").render(header=top, sections=shown, chart_data=data)


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Returns the Jinja environment of the templates.

    It escapes all text and makes hidden characters visible; only the filter `svg` returns markup.
    """
    environment = Environment(
        loader=PackageLoader("icet_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"svg": svg, "digest": _digest, "kind": _kind}
    environment.globals |= {"colours": COLOURS, "tones": TONES, "styles": STYLES, "selectors": SELECTORS}
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _finalize(value: object) -> str:
    """Returns what a template prints for a value: markup unchanged, other values as text with `visible` characters."""
    return value if isinstance(value, Markup) else visible(str(value))


def _kind(block: Block) -> str:
    """Returns the name of a block's class, from which `blocks.html` chooses the HTML to write."""
    if not isinstance(block, Block):
        raise TypeError(f"{type(block).__name__} is not a block of a page")
    return type(block).__name__


def _digest(text: str) -> str:
    """Returns the expression by which the page's content security policy allows exactly this inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
