"""Defines the marks that charts consist of (lines, boxes, dots, labels), and their colours and styles.

The page's style sheet and the PNG files both take colours, line widths and dashes from the tables in this file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Number = float | int


@dataclass(frozen=True)
class Colour:
    """Holds a colour for the light and for the dark version of the page."""

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
    "shadow": Colour("#b9b2a0", "#000000"),
    "alert": Colour("#b3171e", "#ff8080"),
    "changed": Colour("#f6e3a4", "#5b4a12"),
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
"""Largest number of runs in a chart, because there are only so many combinations of colour and dash."""


@dataclass(frozen=True)
class Tone:
    """Describes the line and markers of a series. Its colour is the entry of the same name in `COLOURS`.

    Attributes:
      dash: lengths of a dash and of the gap after it, in pixels; empty for a solid line.
      hollow: whether markers are filled with the page's colour.
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
    **{f"run-{index}": Tone(dash=_RUN_DASHES[index % 3]) for index in range(MOST_RUNS)},
}


@dataclass(frozen=True)
class Style:
    """Describes how a kind of mark is drawn.

    Attributes:
      fill, stroke: names of colours, or "tone" for the colour of the layer's tone; empty for none.
      width: width of the stroke, in pixels.
      dash: see `Tone.dash`; marks of the style "stroke" take the dash of their tone instead.
      opacity: 0 (invisible) to 1.
      size: height of letters, in pixels.
      bold: whether letters are bold.
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
        """Returns the style as CSS declarations."""
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
    "error-bar": Style(stroke="tone", width=1.2, opacity=0.55),
    "reference": Style(stroke="tone", width=1.6, dash=(1.5, 3)),
    "reference-end": Style(stroke="tone", width=1.6),
    "front": Style(stroke="muted", width=1.2, dash=(5, 3)),
    "leader": Style(stroke="muted", width=0.6),
}
SELECTORS = {"label": "svg text", "dot": "circle", "cell": ".cells rect"}
"""Styles that the page applies by CSS selector instead of a class on each mark, because there are many such marks."""


@dataclass(frozen=True)
class Path:
    """A line through points; if `closed`, the area that it surrounds."""

    points: Sequence[tuple[Number, Number]]
    style: str
    closed: bool = False


@dataclass(frozen=True)
class Box:
    """A rectangle. With the style "hit" it is invisible and only shows its tooltip.

    Attributes:
      x, y: upper left corner.
      width, height: size in pixels.
      style: name in `STYLES`, or "hit".
      tip: text of the box's tooltip; "" for no tooltip.
      place: (name of the axis, position on it), by which the page's script finds all boxes of an exit or depth.
      opacity: opacity of the fill, 0 to 1; None means that of the style.
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
    """A circle with its centre at (x, y)."""

    x: Number
    y: Number
    radius: Number
    style: str = "dot"


@dataclass(frozen=True)
class Label:
    """A line of text. The point (x, y) is on its baseline: at its "start", "middle" or "end", as `anchor` says."""

    x: Number
    y: Number
    text: str
    anchor: str = "start"
    style: str = "label"


Mark = Path | Box | Dot | Label


@dataclass(frozen=True)
class Layer:
    """Marks of one `purpose` ("axes", "series", "cells", "hits") and tone; later marks cover earlier ones."""

    purpose: str
    marks: Sequence[Mark]
    tone: str = ""


@dataclass(frozen=True)
class Drawing:
    """A chart that is laid out: every mark has its position in pixels.

    Attributes:
      width, height: size in pixels at full size.
      title: text for screen readers.
      layers: layers of marks; later ones cover earlier ones.
      shape: names of CSS classes for the whole drawing, such as "heat"; empty for a line chart.
    """

    width: int
    height: int
    title: str
    layers: Sequence[Layer]
    shape: str = ""
