"""Draws a figure as a PNG file, for papers and README pages.

Pillow's own font is used, so that the same figure gives the same file on every machine. This font has only Latin
letters: accents are left out, and letters of other scripts become question marks.
"""

import io
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageColor, ImageDraw, ImageFont

from icet_jax.report.charts.figures import Figure, Key
from icet_jax.report.charts.marks import COLOURS, STYLES, TONES, Box, Dot, Label, Layer, Number, Path, Style

_SCALE = 2  # pixels of the file per pixel of a drawing
_OVERSAMPLING = 2  # the image is drawn larger by this factor and then reduced, which gives smooth edges
_MARGIN, _CAPTION, _PANEL_TITLE, _LEGEND, _GAP = 18, 40, 20, 26, 22  # in pixels of a drawing, as all lengths here
_ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}  # {anchor of a `Label`: Pillow's name for it}
_KEY = Style(fill="ink", size=12)
_SAMPLE_WIDTHS = {"ramp": 92, "box": 26}  # {shape of a legend's sample: its width}; other shapes have 38
_REPLACED = str.maketrans({"−": "-", "–": "-", "—": "-", "→": ">", "×": "x", "\u2009": " ", "\n": " "})


def png(figure: Figure) -> bytes:
    """Returns the bytes of a figure's PNG file, from top to bottom: title, metric and data set, panels, legend."""
    drawings = figure.print_drawings()
    titles = _PANEL_TITLE if any(panel.title for panel in figure.panels) else 0
    width = 2 * _MARGIN + sum(drawing.width for drawing in drawings) + _GAP * (len(drawings) - 1)
    height = _MARGIN + _CAPTION + titles + max(drawing.height for drawing in drawings) + _MARGIN
    legend = _legend_rows(figure.keys, width - 2 * _MARGIN)
    canvas = _Canvas(width, height + _LEGEND * len(legend))
    canvas.text(_MARGIN, _MARGIN + 12, figure.title, Style(fill="ink", size=15, bold=True))
    canvas.text(_MARGIN, _MARGIN + 29, ", ".join(filter(None, (figure.name, figure.source))), Style(fill="muted"))
    left = _MARGIN
    for panel, drawing in zip(figure.panels, drawings, strict=True):
        if panel.title:
            canvas.text(left, _MARGIN + _CAPTION + 10, panel.title, Style(fill="ink", size=12.5))
        canvas.origin = (left, _MARGIN + _CAPTION + titles)
        for layer in drawing.layers:
            canvas.layer(layer)
        canvas.origin = (0, 0)
        left += drawing.width + _GAP
    for row, keys in enumerate(legend):
        _draw_keys(canvas, keys, height - 2 + row * _LEGEND)
    return canvas.file()


def _legend_rows(keys: Sequence[Key], width: Number) -> list[list[Key]]:
    """Returns the entries of the legend arranged in rows that are at most `width` pixels wide."""
    rows: list[list[Key]] = []
    free_width: Number = 0
    for key in keys:
        key_width = _key_width(key)
        if not rows or free_width < key_width:
            rows.append([])
            free_width = width
        rows[-1].append(key)
        free_width -= key_width
    return rows


def _key_width(key: Key) -> float:
    """Returns the width in pixels of an entry of the legend with the space after it."""
    letters = _font(_KEY.size * _SCALE).getlength(_drawable(key.before + key.label)) / _SCALE
    return letters + _SAMPLE_WIDTHS.get(key.shape, 38) + (26 if key.before else 20)


def _draw_keys(canvas: "_Canvas", keys: Sequence[Key], y: Number) -> None:
    """Draws a row of the legend at height `y`, from the left margin on."""
    x = float(_MARGIN)
    for key in keys:
        x += canvas.text(x, y + 4, key.before, _KEY) + 6 if key.before else 0
        marks: list[Path | Dot | Box] = []
        if key.shape == "ramp":
            marks = [Box(x + step * 4, y - 5, 4, 10, "cell", opacity=step / 20) for step in range(1, 21)]
        elif key.shape == "box":
            marks = [Box(x, y - 6, 18, 12, "mark-planted")]
        else:
            marks = [Path(((x, y), (x + 30, y)), "reference" if key.shape == "dotted" else "stroke")]
            marks += [Dot(x + 15, y, 3)] if key.shape == "dot" else []
        canvas.layer(Layer("series", marks, key.tone))
        x += _SAMPLE_WIDTHS.get(key.shape, 38)
        x += canvas.text(x, y + 4, key.label, _KEY) + 20


class _Canvas:
    """An image to draw on. `origin` is the pixel of the image at which (0, 0) of the current drawing lies."""

    def __init__(self, width: int, height: int) -> None:
        self._factor = _SCALE * _OVERSAMPLING
        self._image = Image.new("RGB", (width * self._factor, height * self._factor), "white")
        self._draw = ImageDraw.Draw(self._image, "RGBA")
        self.origin: tuple[Number, Number] = (0, 0)

    def layer(self, layer: Layer) -> None:
        """Draws the marks of a layer, without the invisible areas that only show tooltips."""
        for mark in layer.marks:
            if mark.style == "hit":
                continue
            style = STYLES[mark.style]
            match mark:
                case Label():
                    self.text(mark.x, mark.y, mark.text, style, anchor=mark.anchor, tone=layer.tone)
                case Dot():
                    self._dot(mark, style, layer.tone)
                case Box():
                    corners = [(mark.x, mark.y), (mark.x + mark.width - 0.25, mark.y + mark.height - 0.25)]
                    opacity = style.opacity if mark.opacity is None else mark.opacity
                    self._draw.rectangle(self._to_pixels(corners), fill=_rgba(style.fill, layer.tone, opacity))
                case Path():
                    self._path(mark, style, layer.tone)

    def text(self, x: Number, y: Number, text: str, style: Style, *, anchor: str = "start", tone: str = "") -> float:
        """Draws a line of text and returns its width in pixels of a drawing."""
        font, shown = _font(style.size * self._factor), _drawable(text)
        weight = self._factor * 0.25 if style.bold else 0
        self._draw.text(
            self._to_pixels([(x, y)])[0], shown, _rgba(style.fill, tone, style.opacity), font, _ANCHORS[anchor],
            stroke_width=weight,
        )  # fmt: skip
        return font.getlength(shown) / self._factor

    def file(self) -> bytes:
        """Returns the image as the bytes of a PNG file."""
        buffer = io.BytesIO()
        self._image.reduce(_OVERSAMPLING).save(buffer, format="PNG", dpi=(192, 192))
        return buffer.getvalue()

    def _dot(self, dot: Dot, style: Style, tone: str) -> None:
        hollow = dot.style == "dot" and tone in TONES and TONES[tone].hollow
        fill, stroke, width = ("page", "tone", 1.8) if hollow else (style.fill, style.stroke, style.width)
        outer = dot.radius + width / 2
        corners = self._to_pixels([(dot.x - outer, dot.y - outer), (dot.x + outer, dot.y + outer)])
        inside = _rgba(fill, tone, 1.0) if fill else None
        self._draw.ellipse(corners, inside, _rgba(stroke, tone, 1.0), round(width * self._factor))

    def _path(self, path: Path, style: Style, tone: str) -> None:
        points = self._to_pixels(path.points)
        if path.closed:
            self._draw.polygon(points, fill=_rgba(style.fill, tone, style.opacity))
            return
        dash = TONES[tone].dash if path.style == "stroke" and tone in TONES else style.dash
        colour, width = _rgba(style.stroke, tone, style.opacity), round(style.width * self._factor)
        for piece in _dashed(points, [length * self._factor for length in dash]):
            self._draw.line(piece, fill=colour, width=width, joint="curve")

    def _to_pixels(self, points: Sequence[tuple[Number, Number]]) -> list[tuple[Number, Number]]:
        """Converts points of the current drawing to pixels of the oversampled image."""
        left, top = self.origin
        return [((left + x) * self._factor, (top + y) * self._factor) for x, y in points]


def _dashed(points: list[tuple[Number, Number]], dash: Sequence[Number]) -> list[list[tuple[Number, Number]]]:
    """Cuts a line, given by its corners, into dashes, and returns the corners of each dash.

    `dash` has the lengths of a dash and of the gap after it, which repeat along the line; it is empty for a solid line.
    """
    if not dash:
        return [points]
    pieces: list[list[tuple[Number, Number]]] = [[points[0]]]
    element, remaining = 0, dash[0]  # index of the current dash (even) or gap (odd), and its remaining length
    for (x1, y1), (x2, y2) in zip(points, points[1:], strict=False):
        length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
        covered = 0.0
        while length - covered > remaining:
            covered += remaining
            end = (x1 + (x2 - x1) * covered / length, y1 + (y2 - y1) * covered / length)
            if element % 2 == 0:
                pieces[-1].append(end)
            else:
                pieces.append([end])
            element, remaining = element + 1, dash[(element + 1) % len(dash)]
        remaining -= length - covered
        if element % 2 == 0:
            pieces[-1].append((x2, y2))
    return [piece for piece in pieces if len(piece) > 1]


def _rgba(colour: str, tone: str, opacity: Number) -> tuple[int, ...]:
    """Returns a colour of the light page as (red, green, blue, alpha), 0 to 255 each; "tone" is the colour `tone`."""
    name = tone if colour == "tone" else colour
    # The background of files is white.
    red, green, blue = ImageColor.getrgb("#ffffff" if name == "page" else COLOURS[name].light)[:3]
    return (red, green, blue, round(255 * opacity))


@lru_cache(maxsize=32)
def _font(size: Number) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return font


def _drawable(text: str) -> str:
    """Returns text in which letters that the font does not have are replaced."""
    plain = unicodedata.normalize("NFKD", text.translate(_REPLACED))
    letters = (char for char in plain if not unicodedata.combining(char))
    return "".join(char if char.isascii() and char.isprintable() or char in "…·" else "?" for char in letters)
