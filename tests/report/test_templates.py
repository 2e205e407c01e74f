"""Every text of every kind of block is escaped, and nothing hidden stays hidden."""

import re
from dataclasses import fields, is_dataclass, replace

import pytest

from icet_jax.report.blocks import (
    Bullets,
    Details,
    Grid,
    Heading,
    Links,
    Notice,
    Paragraph,
    Span,
    Table,
    Tile,
    Tiles,
    Viewer,
    text,
)  # fmt: skip
from icet_jax.report.charts.figures import Figure, Key, Panel
from icet_jax.report.charts.lines import Chart, Point, Series
from icet_jax.report.packing import compress
from tests.report.markup import html, transcript_data
from tests.report.test_page import Page
from tests.report.test_text import PAYLOADS

WORDS = text("plain", Span("code", "code"), Span("bold", "b"), Span("small", "ci"))
CHART = Chart("chart", [Series("label", "after", [Point(1, 0.5), Point(2, 0.7, 0.6, 0.8)])], show=lambda x: f"{x:g} x")
KEYS = (Key("dot", "after"), Key("line", "run-1", "line"), Key("high", "after", "ramp", before="low"))
FIGURE = Figure("figure", "metric", (Panel(CHART, "panel"),), KEYS, wide=True)
BLOCKS = [
    Heading("heading"),
    Paragraph(WORDS),
    Bullets([WORDS]),
    Grid([FIGURE]),
    FIGURE,
    replace(FIGURE, panels=(Panel(FIGURE.wide_drawing(FIGURE.panels[0])),)),
    Table("caption", [WORDS], [[WORDS, WORDS]]),
    Tiles([Tile("label", WORDS, "metric")]),
    Notice([WORDS]),
    Links("label", [("address", "name")]),
    Viewer("cGFja2Vk", 8, 7, ("Before", "After")),
    Details("summary", [Heading("inner")]),
]
FIXED = {
    "look",
    "place",
    "tone",
    "shape",
    "style",
    "purpose",
    "anchor",
    "x_name",
}  # written in the code, never read from a file


def with_payload(value, payload):
    """The value with the payload at the end of every text in it."""
    if isinstance(value, str):
        return value + payload
    if isinstance(value, list | tuple):
        return type(value)(with_payload(item, payload) for item in value)
    if isinstance(value, dict):
        return {name: with_payload(item, payload) for name, item in value.items()}
    if not is_dataclass(value):
        return value
    names = [field.name for field in fields(value) if field.name not in FIXED]
    return replace(value, **{name: with_payload(getattr(value, name), payload) for name in names})


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)
def test_text_never_becomes_markup(block, payload):
    plain, marked = html([block]), html([with_payload(block, payload)])
    assert Page(marked).tags == Page(plain).tags and marked != plain
    assert not any(name.startswith("on") for name, _ in Page(marked).attributes)
    assert not set("\u202e\u2028\u2029\x00\x1b\ud800") & set(marked)
    marked.encode("utf-8")


@pytest.mark.parametrize("payload", [*PAYLOADS, "\ud800"])
def test_transcripts_cannot_leave_their_script(payload):
    markup = html([Viewer(compress({"x": payload}), 8, 7, ("Before", "After"))])
    data = re.search(r'id="transcript-data">(.*?)</script>', markup, re.S)[1]
    assert re.fullmatch("[A-Za-z0-9+/=]+", data)
    assert transcript_data(markup) == {"x": payload.replace("\ud800", "?")}


def test_transcripts_refuse_what_json_has_no_word_for():
    with pytest.raises(ValueError):
        compress({"x": float("nan")})


def test_every_kind_of_block_is_written():
    assert all(html([block]).strip() for block in BLOCKS)
    with pytest.raises(TypeError, match="Odd"):
        html([type("Odd", (), {})()])
