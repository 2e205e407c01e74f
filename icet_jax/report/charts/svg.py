"""Writes a drawing as inline SVG, which needs no script and takes its colours from the page's style sheet."""

from markupsafe import Markup

from icet_jax.report.charts.marks import COLOURS, SELECTORS, STYLES, TONES, Box, Dot, Drawing, Label, Layer, Mark, Path
from icet_jax.report.text import escape


def svg(drawing: Drawing) -> Markup:
    """Returns the `<svg>` element of a drawing; all text in it is escaped."""
    shape = f' class="{drawing.shape}"' if drawing.shape else ""
    head = (
        f'<svg{shape} viewBox="0 0 {drawing.width} {drawing.height}" role="img" aria-label="{escape(drawing.title)}">'
    )
    return Markup(head + "".join(map(_layer, drawing.layers)) + "</svg>")  # noqa: S704


def svg_file(drawing: Drawing) -> str:
    """Returns a drawing as an SVG file that needs no style sheet, in the colours of the light page on white."""
    rules = [f"svg {{ {'; '.join(f'--{name}: {colour.light}' for name, colour in COLOURS.items())}; --page: #ffffff }}"]
    rules.append("svg { font: 11.5px sans-serif }")
    rules += [f".{name} {{ --tone: var(--{name}) }}" for name in TONES]
    rules += [f"{SELECTORS.get(name, '.' + name)} {{ {style.css} }}" for name, style in STYLES.items()]
    rules.append(".hits rect { fill: transparent }")
    size = f'xmlns="http://www.w3.org/2000/svg" width="{drawing.width}" height="{drawing.height}"'
    background = f'<rect width="{drawing.width}" height="{drawing.height}" fill="#ffffff"/>'
    head, _, rest = str(svg(drawing)).partition(">")
    return f"{head.replace('<svg', f'<svg {size}', 1)}><style>{chr(10).join(rules)}</style>{background}{rest}\n"


def _layer(layer: Layer) -> str:
    return f'<g class="{f"{layer.purpose} {layer.tone}".strip()}">{"".join(map(_mark, layer.marks))}</g>'


def _mark(mark: Mark) -> str:
    """Returns the SVG element of a mark."""
    style = "" if mark.style in SELECTORS or mark.style == "hit" else f' class="{mark.style}"'
    match mark:
        case Path():
            path = "L".join(f"{x:g} {y:g}" for x, y in mark.points)
            return f'<path{style} d="M{path}{"Z" if mark.closed else ""}"/>'
        case Dot():
            return f'<circle{style} cx="{mark.x:g}" cy="{mark.y:g}" r="{mark.radius:g}"/>'
        case Label():
            anchor = "" if mark.anchor == "start" else f' text-anchor="{mark.anchor}"'
            return f'<text{style} x="{mark.x:g}" y="{mark.y:g}"{anchor}>{escape(mark.text)}</text>'
        case Box():
            place = f' data-{mark.place[0]}="{mark.place[1]}"' if mark.place else ""
            opacity = "" if mark.opacity is None else f' fill-opacity="{mark.opacity:.2f}"'
            area = f'x="{mark.x:.1f}" y="{mark.y:g}" width="{mark.width:.1f}" height="{mark.height:g}"'
            title = f"<title>{escape(mark.tip)}</title>" if mark.tip else ""
            return f"<rect{style}{place} {area}{opacity}>{title}</rect>"
