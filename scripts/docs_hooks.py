"""Hooks of mkdocs (mkdocs.yml): further pages of the site, and links to files that the site does not have.

launch/README.md and the notebooks, with their outputs, become pages of the site, and so do reports of runs that are
present. A link to a file of the repository that is no page of the site is replaced by the file's name.
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
"""Pages of the site that are not in docs/; they have the same path in the site and in the repository."""

REPORTS = {
    "runs/organism/report.html": "reports/organism.html",
    "runs/methods/compare.html": "reports/methods.html",
}
"""{report of a run: its path in the site}. A report that is not present is left out, and so are links to it."""

_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_REPORT = re.compile(r"<!-- report: (\S+) -->")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: Any) -> Files:
    """Returns the files of the site after adding the pages of `OUTSIDE`, the reports, and a page for each notebook."""
    present = {path: target for path, target in REPORTS.items() if (ROOT / path).is_file()}
    for path, target in ({path: path for path in OUTSIDE} | present).items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / path)))
    for path in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        text = notebook_page(json.loads(path.read_text(encoding="utf-8")))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Returns the text of a page after `report_links` and `site_links`."""
    return site_links(report_links(markdown, page.file.src_uri), page.file.src_uri)


def notebook_page(notebook: dict[str, Any]) -> str:
    """Returns a notebook as Markdown: its text, its code, and the printed and drawn outputs."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
        elif cell["cell_type"] == "code" and text.strip():
            parts.append(f"```python\n{text}\n```")
            parts += filter(None, map(_output_as_markdown, cell["outputs"]))
    return "\n\n".join(parts) + "\n"


def _output_as_markdown(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        picture = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="what this cell draws" src="data:image/png;base64,{picture}">'
    text = _COLOURS.sub("", "".join(output.get("text", data.get("text/plain", ""))))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def report_links(markdown: str, page: str) -> str:
    """Returns the Markdown of a page with each `<!-- report: FILE -->` replaced by a link to that report in the site.

    The comment is removed if there is no such report here.

    Args:
      markdown: text of the page.
      page: path of the page in the site.

    Raises:
      KeyError: the file is not in `REPORTS`.
    """

    def replace(comment: re.Match[str]) -> str:
        target = posixpath.relpath(REPORTS[comment[1]], posixpath.dirname(page) or ".")
        return f"[Open the report]({target})" if (ROOT / comment[1]).is_file() else ""

    return _REPORT.sub(replace, markdown)


def site_links(markdown: str, page: str) -> str:
    """Returns the Markdown of a page with links to files replaced by links to pages of the site, or by file names.

    Args:
      markdown: text of the page.
      page: path of the page in the site.
    """
    source = page if page in OUTSIDE else f"{DOCS}/{page}"

    def replace(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if ":" in target or target.startswith("/"):
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if file in OUTSIDE or file.startswith(f"{DOCS}/"):
            target_page = file if file in OUTSIDE else file.removeprefix(f"{DOCS}/")
            if target_page.endswith(".ipynb"):
                target_page = target_page.removesuffix(".ipynb") + ".md"
            return f"[{text}]({posixpath.relpath(target_page, posixpath.dirname(page) or '.')}{anchor})"
        if (ROOT / file).exists():
            return text if file in text else f"{text} (`{file}`)"
        return link[0]  # mkdocs reports that the target does not exist

    return _LINK.sub(replace, markdown)
