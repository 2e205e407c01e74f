"""The frame of every page: one file, its own style and script inside, nothing fetched."""

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from icet_jax.report.text import escape


def document_html(title: str, header_html: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page.

    Args:
      title: of the window, plain text.
      header_html: the `<header>` element.
      sections: (anchor, title, markup) in reading order; one without markup is left out.
    """
    shown = [(anchor, name, body) for anchor, name, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{anchor.capitalize()}</a>' for anchor, _, _ in shown)
    body = "".join(f'<section id="{anchor}"><h2>{escape(name)}</h2>{html}</section>' for anchor, name, html in shown)
    style, script = _asset("report.css"), _asset("report.js")
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src {_digest(style)}; script-src {_digest(script)}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f'{header_html}<nav aria-label="Contents"><div>{links}</div></nav><main>{body}</main>'
        f'<div id="tip" aria-hidden="true" hidden></div><script>{script}</script></body></html>\n'
    )


def _asset(name: str) -> str:
    return files("icet_jax.report").joinpath("assets", name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """The source expression that lets exactly this inline text through the page's content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"
