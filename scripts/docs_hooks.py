"""What mkdocs does not do by itself (named in mkdocs.yml): pages outside docs/, and links that leave docs/.

launch/README.md is a page of the site too. A link from a page to another file of the repository, which is right where
the page is read in the repository, becomes that file's name: the site has no such file.
"""

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


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of `OUTSIDE`."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with its links as the site needs them."""
    return site_links(markdown, page.file.src_uri)


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
            return f"[{text}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor})"
        if (ROOT / wanted).exists():
            return text if wanted in text else f"{text} (`{wanted}`)"
        return link[0]  # mkdocs says that it leads nowhere

    return _LINK.sub(turned, markdown)
