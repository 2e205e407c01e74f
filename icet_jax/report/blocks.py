"""What a page is made of, without markup: sections of blocks, blocks of text. `templates/blocks.html` writes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from icet_jax.report.charts.figures import Figure


@dataclass(frozen=True)
class Span:
    """A piece of text; `look` is "code", "b" or a class of the style sheet, empty for plain text."""

    text: str
    look: str = ""


Text = tuple[Span, ...]


def text(*parts: str | Span | Text) -> Text:
    """The parts as one text; a string is a plain span."""
    spans: list[Span] = []
    for part in parts:
        spans += part if isinstance(part, tuple) else [part if isinstance(part, Span) else Span(part)]
    return tuple(spans)


def code(name: str) -> Span:
    """A name from a file, in the fixed-width face."""
    return Span(name, "code")


def remark(words: str) -> Span:
    """A small grey addition: an interval, a place."""
    return Span(words, "ci")


def joined(parts: Sequence[str | Span | Text], separator: str = ", ") -> Text:
    """The parts with a separator between them."""
    spans: list[str | Span | Text] = []
    for part in parts:
        spans += [separator, part] if spans else [part]
    return text(*spans)


@dataclass(frozen=True)
class Heading:
    """The title of a part of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; `look` is a class of the style sheet."""

    text: Text
    look: str = "note"


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[Text]


@dataclass(frozen=True)
class Grid:
    """Figures side by side, as many as fit."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is its head. It scrolls sideways where it must."""

    caption: str
    head: Sequence[Text]
    rows: Sequence[Sequence[Text]]


@dataclass(frozen=True)
class Tile:
    """A key figure: what it is, its value, and the metric's full name."""

    label: str
    value: Text
    metric: str


@dataclass(frozen=True)
class Tiles:
    """The key figures under the headline."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Notice:
    """Paragraphs in a box that must not be overlooked."""

    paragraphs: Sequence[Text]


@dataclass(frozen=True)
class Links:
    """Links to other files of the run directory: (address, text)."""

    label: str
    links: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Viewer:
    """The transcripts with their prompt and exit selectors; the page's script fills in the text.

    Attributes:
      data: what the script reads (JSON).
      exits: how many exits there are.
      start: the exit that is shown first.
    """

    data: dict[str, Any]
    exits: int
    start: int


@dataclass(frozen=True)
class Details:
    """Blocks behind a line to open."""

    summary: str
    blocks: "Sequence[Block]"


Block = Heading | Paragraph | Bullets | Grid | Figure | Table | Tiles | Notice | Links | Viewer | Details


@dataclass(frozen=True)
class Section:
    """A part of the page; `anchor` is its name in addresses and in the list of contents."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Header:
    """The top of the page.

    Attributes:
      kicker: what kind of page it is.
      name: of the run directory; empty for several.
      sentence: the headline.
      blocks: what stands below it.
    """

    kicker: str
    name: str
    sentence: str
    blocks: Sequence[Block]


def table(caption: str, head: Sequence[str | Text], rows: Sequence[Sequence[Text]]) -> list[Block]:
    """A table, or nothing where there is no row."""
    return [Table(caption, [text(cell) for cell in head], rows)] if rows else []


def details(summary: str, blocks: Sequence[Block]) -> list[Block]:
    """Something to open, or nothing where there is nothing inside."""
    return [Details(summary, blocks)] if blocks else []


def grid(figures: Sequence[Figure | None]) -> list[Block]:
    """The figures that have something to show side by side, or nothing."""
    shown = [figure for figure in figures if figure is not None]
    return [Grid(shown)] if shown else []


def note(*parts: str | Span | Text) -> Paragraph:
    """A small grey paragraph."""
    return Paragraph(text(*parts))
