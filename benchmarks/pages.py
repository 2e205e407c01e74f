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


def filled(prose: str) -> str:
    """Returns a paragraph in lines of at most 120 characters."""
    return textwrap.fill(" ".join(prose.split()), 120, break_long_words=False, break_on_hyphens=False)
