"""What the pages have in common that are made from the rows of a JSON file: a statement by hand, and filled lines."""

import re
import textwrap

BEGIN, END = "<!-- result: edited by hand, kept by --page -->", "<!-- end of the result -->"


def by_hand(old: str, default: str) -> str:
    """Returns the statement of the result between its two marks.

    Args:
      old: the present page, whose statement is kept; "" if there is none.
      default: the statement of a page that has none yet.
    """
    kept = re.search(f"{re.escape(BEGIN)}\n(.*?)\n{re.escape(END)}", old, re.S)
    return f"{BEGIN}\n{kept[1] if kept else default}\n{END}"


def generated(page: str, begin: str, end: str) -> str:
    """Returns what stands between two marks of a page, which a script makes; "" if the marks are missing."""
    return page.partition(f"{begin}\n")[2].partition(f"\n{end}")[0]


def with_generated(page: str, begin: str, end: str, part: str) -> str:
    """Returns a page with `part` between the two marks."""
    before, _, rest = page.partition(f"{begin}\n")
    return f"{before}{begin}\n{part}\n{end}{rest.partition(end)[2]}"


def filled(prose: str) -> str:
    """Returns a paragraph in lines of at most 120 characters."""
    return textwrap.fill(" ".join(prose.split()), 120, break_long_words=False, break_on_hyphens=False)
