"""Defines what a page consists of: sections, their blocks, and text. `templates/blocks.html` renders them as HTML."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from icet_jax.report.charts.figures import Figure


@dataclass(frozen=True)
class Span:
    """A piece of text; its `look` is "code", "b" (bold), a class of the style sheet, or "" for plain text."""

    text: str
    look: str = ""


Text = tuple[Span, ...]


def text(*parts: str | Span | Text) -> Text:
    """Returns one text made of the parts; a string becomes a plain span."""
    spans: list[Span] = []
    for part in parts:
        spans += part if isinstance(part, tuple) else [part if isinstance(part, Span) else Span(part)]
    return tuple(spans)


def code(name: str) -> Span:
    """Returns a name from a file, in a fixed-width font."""
    return Span(name, "code")


def remark(words: str) -> Span:
    """Returns a small grey addition, such as an interval."""
    return Span(words, "ci")


def joined(parts: Sequence[str | Span | Text], separator: str = ", ") -> Text:
    """Returns one text made of the parts with a separator between them."""
    spans: list[str | Span | Text] = []
    for part in parts:
        spans += [separator, part] if spans else [part]
    return text(*spans)


@dataclass(frozen=True)
class Heading:
    """A title inside a section."""

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
    """A table. `head` is its first row, and the first cell of each other row is that row's heading."""

    caption: str
    head: Sequence[Text]
    rows: Sequence[Sequence[Text]]


@dataclass(frozen=True)
class Tile:
    """A key figure: its label, its value, and the full name of the metric."""

    label: str
    value: Text
    metric: str


@dataclass(frozen=True)
class Tiles:
    """The key figures under the headline."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Notice:
    """Paragraphs in a coloured box, for what a reader must not miss; `look` is "notice" or, in red, "alert"."""

    paragraphs: Sequence[Text]
    look: str = "notice"


@dataclass(frozen=True)
class Links:
    """Links to other files of the run directory: (address, text)."""

    label: str
    links: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Viewer:
    """The transcripts, with controls to search, to filter, and to select a row and an exit; the page's script fills in
    the text.

    Attributes:
      data: what the script reads, from `packing.compress`.
      exits: number of exits.
      start: the exit that is shown first.
      cards: titles of the two responses that are shown side by side.
    """

    data: str
    exits: int
    start: int
    cards: tuple[str, str]


@dataclass(frozen=True)
class Details:
    """Blocks that are collapsed until the reader clicks on the `summary`."""

    summary: str
    blocks: "Sequence[Block]"


Block = Heading | Paragraph | Bullets | Grid | Figure | Table | Tiles | Notice | Links | Viewer | Details


@dataclass(frozen=True)
class Section:
    """A section of the page; `anchor` is its name in URLs, to which the table of contents links."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Header:
    """The top of the page.

    Attributes:
      kicker: the kind of page, in small letters above the headline.
      name: name of the run directory; empty if there are several.
      sentence: the headline.
      blocks: what follows below the headline.
      alerts: what stands above the headline, so that no reader misses it.
    """

    kicker: str
    name: str
    sentence: str
    blocks: Sequence[Block]
    alerts: Sequence[Block] = ()


def figures(blocks: Sequence[Block]) -> Iterator[Figure]:
    """Yields the figures in blocks, in the order in which the page has them."""
    for block in blocks:
        match block:
            case Figure():
                yield block
            case Grid():
                yield from block.figures
            case Details():
                yield from figures(block.blocks)


def table(caption: str, head: Sequence[str | Text], rows: Sequence[Sequence[Text]]) -> list[Block]:
    """Returns a table as a list of one block; an empty list if there are no rows."""
    return [Table(caption, [text(cell) for cell in head], rows)] if rows else []


def details(summary: str, blocks: Sequence[Block]) -> list[Block]:
    """Returns a list with one block that is collapsed until a reader opens it; [] if there are no blocks."""
    return [Details(summary, blocks)] if blocks else []


def grid(figures: Sequence[Figure | None]) -> list[Block]:
    """Returns the figures that are not None side by side, as a list of one block; [] if all are None."""
    shown = [figure for figure in figures if figure is not None]
    return [Grid(shown)] if shown else []


def note(*parts: str | Span | Text) -> Paragraph:
    """Returns a small grey paragraph."""
    return Paragraph(text(*parts))
