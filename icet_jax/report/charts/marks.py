"""What every chart is made of: lines, boxes, dots and labels in named styles and colours.

The page's style sheet and the PNG files take their colours, widths and dashes from the tables of this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Number = float | int


@dataclass(frozen=True)
class Colour:
    """One colour of the page, in its light and in its dark version."""

    light: str
    dark: str


COLOURS = {
    "page": Colour("#fbfaf6", "#15171a"),
    "panel": Colour("#ffffff", "#1c1f23"),
    "ink": Colour("#1e1d1a", "#ebe8e1"),
    "muted": Colour("#676358", "#a09b90"),
    "rule": Colour("#e3dfd3", "#32363b"),
    "grid": Colour("#ece8dd", "#2a2e33"),
    "notice": Colour("#f5efdc", "#2a2617"),
    "before": Colour("#bf4417", "#ff8d63"),
    "after": Colour("#10697f", "#58bfd6"),
    "plain": Colour("#4c4a7d", "#a9a6e8"),
    "planted": Colour("#b08a15", "#dcb849"),
    "unsafe": Colour("#bf4417", "#ff8d63"),
    "safe": Colour("#3d7f5f", "#74c49d"),
    "refused": Colour("#b08a15", "#dcb849"),
    "run-0": Colour("#2563b8", "#7fb2ff"),
    "run-1": Colour("#b26b00", "#f0a63c"),
    "run-2": Colour("#4d7f1d", "#a4cf66"),
    "run-3": Colour("#b0327a", "#f08ac0"),
    "run-4": Colour("#6b3fb0", "#b9a2f0"),
    "run-5": Colour("#0f7b7b", "#5fd0c8"),
    "run-6": Colour("#8c4a2f", "#d9a283"),
    "run-7": Colour("#5b6470", "#b3bcc8"),
}
MOST_RUNS = 8
"""How many runs the colours and dashes of a chart tell apart."""


@dataclass(frozen=True)
class Tone:
    """How the lines of a series differ from those of another, beside their colour (the one of the same name).

    Attributes:
      dash: lengths of a dash and of the gap after it; empty for a solid line.
      hollow: True for markers that are filled with the page's colour.
    """

    dash: tuple[Number, ...] = ()
    hollow: bool = False


_RUN_DASHES: tuple[tuple[Number, ...], ...] = ((), (7, 4), (2, 3.5))
TONES = {
    "before": Tone(dash=(6, 3), hollow=True),
    "after": Tone(),
    "plain": Tone(),
    "planted": Tone(),
    "unsafe": Tone(),
    "safe": Tone(),
    "refused": Tone(),
    **{f"run-{place}": Tone(dash=_RUN_DASHES[place % 3]) for place in range(MOST_RUNS)},
}


@dataclass(frozen=True)
class Style:
    """How a kind of mark is drawn.

    Attributes:
      fill, stroke: names of colours, or "tone" for the colour of the layer's tone; empty for none.
      width: of the stroke, in pixels.
      dash: see `Tone.dash`; a "stroke" takes its tone's.
      opacity: 0..1.
      size: height of letters, in pixels.
      bold: True for heavy letters.
    """

    fill: str = ""
    stroke: str = ""
    width: Number = 1.0
    dash: tuple[Number, ...] = ()
    opacity: Number = 1.0
    size: Number = 11.5
    bold: bool = False

    @property
    def css(self) -> str:
        """The same as declarations of a style sheet."""
        lines = [f"fill: var(--{self.fill})" if self.fill else "fill: none"]
        if self.stroke:
            lines += [f"stroke: var(--{self.stroke})", f"stroke-width: {self.width:g}"]
        lines += [f"stroke-dasharray: {' '.join(f'{length:g}' for length in self.dash)}"] if self.dash else []
        lines += [f"opacity: {self.opacity:g}"] if self.opacity < 1 else []
        lines += [f"font-size: {self.size:g}px"] if self.size != Style.size else []
        lines += ["font-weight: 600"] if self.bold else []
        return "; ".join(lines)


STYLES = {
    "label": Style(fill="muted"),
    "dot": Style(fill="tone", stroke="page"),
    "cell": Style(fill="tone"),
    "grid-line": Style(stroke="grid"),
    "zero-line": Style(stroke="muted"),
    "mark-default": Style(stroke="ink", dash=(2, 3)),
    "mark-planted": Style(fill="planted", opacity=0.13),
    "mark-text": Style(fill="ink", size=10.5),
    "tick-default": Style(fill="ink", bold=True),
    "tick-planted": Style(fill="planted", bold=True),
    "phase": Style(fill="tone"),
    "stroke": Style(stroke="tone", width=2),
    "thin": Style(stroke="tone", opacity=0.45),
    "band": Style(fill="tone", opacity=0.14),
    "whisker": Style(stroke="tone", width=1.6),
    "ring": Style(stroke="tone", width=1.6),
}
SELECTORS = {"label": "svg text", "dot": "circle", "cell": ".cells rect"}
"""Styles whose marks carry no class of their own in the page, because there are many of them."""


@dataclass(frozen=True)
class Path:
    """Straight lines through points; `closed` makes an area of them."""

    points: Sequence[tuple[Number, Number]]
    style: str
    closed: bool = False


@dataclass(frozen=True)
class Box:
    """A rectangle. One with the style "hit" is not drawn: it shows its `tip` when pointed at.

    Attributes:
      x, y: upper left corner.
      tip: text of its tooltip; empty for none.
      place: (axis, position) by which the page's script finds boxes of the same exit or depth.
      opacity: of the fill, 0..1; None: the style's.
    """

    x: Number
    y: Number
    width: Number
    height: Number
    style: str
    tip: str = ""
    place: tuple[str, str] | None = None
    opacity: float | None = None


@dataclass(frozen=True)
class Dot:
    """A circle around a point."""

    x: Number
    y: Number
    radius: Number
    style: str = "dot"


@dataclass(frozen=True)
class Label:
    """A line of text; `anchor` ("start", "middle" or "end") is where on it (x, y) lies, on its base line."""

    x: Number
    y: Number
    text: str
    anchor: str = "start"
    style: str = "label"


Mark = Path | Box | Dot | Label


@dataclass(frozen=True)
class Layer:
    """Marks of one purpose ("axes", "series", "cells", "hits") and tone, drawn one over the other."""

    purpose: str
    marks: Sequence[Mark]
    tone: str = ""


@dataclass(frozen=True)
class Drawing:
    """A chart with every mark in its place.

    Attributes:
      width, height: in pixels at full size.
      title: for screen readers.
      layers: the lowest first.
      shape: a class for the style sheet ("heat", "heat categories"); empty for a line chart.
    """

    width: int
    height: int
    title: str
    layers: Sequence[Layer]
    shape: str = ""
