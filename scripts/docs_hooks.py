"""What mkdocs does not do by itself (named in mkdocs.yml): pages that are not Markdown in docs/, and links out of it.

launch/README.md and the notebooks, with their outputs, are pages of the site too. A link from a page to another file of
the repository, which is right where the page is read in the repository, becomes that file's name: the site has no such
file.
"""

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
OUTSIDE = ("launch/README.md",)
"""Pages of the site that lie elsewhere in the repository, under the same path in the site."""

_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of `OUTSIDE`, and one for each notebook."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        text = notebook_page(json.loads(path.read_text(encoding="utf-8")))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with its links as the site needs them."""
    return site_links(markdown, page.file.src_uri)


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif cell["cell_type"] == "code" and text.strip():
            parts.append(f"```python\n{text}\n```")
            parts += [shown for output in cell["outputs"] if (shown := _output(output))]
    return "\n\n".join(parts) + "\n"


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="what this cell draws" src="data:image/png;base64,{picture}">'
    text = _COLOURS.sub("", "".join(output.get("text", data.get("text/plain", ""))))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def site_links(markdown: str, page: str) -> str:
    """Links of `page` (its path in the site) that leave docs/, turned to pages of the site or to names of files."""
    here = page if page in OUTSIDE else f"{DOCS}/{page}"

    def turned(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if ":" in target or target.startswith("/"):
            return link[0]
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        if wanted in OUTSIDE or wanted.startswith(f"{DOCS}/"):
            place = wanted if wanted in OUTSIDE else wanted.removeprefix(f"{DOCS}/")
            if place.endswith(".ipynb"):
                place = place.removesuffix(".ipynb") + ".md"
            return f"[{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor})"
        if (ROOT / wanted).exists():
            return text if wanted in text else f"{text} (`{wanted}`)"
        return link[0]  # mkdocs says that it leads nowhere

    return _LINK.sub(turned, markdown)
