"""Formats numbers and untrusted text for a page.

The templates escape all text; charts use `escape`. Characters that reorder, hide or break text are replaced by their
code points, so that a reader sees them.
"""

import html
import math
import re
import unicodedata

# Control characters that are ordinary layout.
_LAYOUT = {"\n", "\t"}
# Cf covers bidi controls, zero-width characters and tags; Zl/Zp are the line separators that end a script line.
_UNSAFE_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

_FOLDERS = re.compile(r"(?<![\w.])/(?:[^\s/'\":=,?&]+/)+")


def without_folders(text: str) -> str:
    """Returns `text` with every absolute path shortened to its last part, so that a page tells nothing of a machine."""
    return _FOLDERS.sub("", text)


def visible(text: str) -> str:
    """Returns `text` with every control, bidi, zero-width, surrogate and unassigned character written as `⟨U+202E⟩`.

    Newlines and tabs stay; `\\r\\n` becomes `\\n`.
    """
    text = text.replace("\r\n", "\n")
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        f"⟨U+{ord(char):04X}⟩" if char not in _LAYOUT and unicodedata.category(char) in _UNSAFE_CATEGORIES else char
        for char in text
    )


def escape(value: object) -> str:
    """Returns `value` as text that is safe in HTML, between tags and inside a quoted attribute."""
    return html.escape(visible(str(value)), quote=True)


def percent(share: float | None, digits: int = 1) -> str:
    """Returns a share in percent: 0.123 as "12.3%", 0 and 1 without decimals, None as an en dash."""
    if share is None:
        return "–"
    return f"{_rounded(100 * share, 0 if min(abs(share), abs(share - 1)) < 1e-12 else digits)}%"


def number(value: float | None) -> str:
    """Returns a number with about three significant digits and a real minus sign; None as an en dash."""
    if value is None:
        return "–"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.2e}".replace("-", "−")
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3
    return _rounded(value, digits)


def points(difference: float | None, digits: int = 1) -> str:
    """Returns a difference of shares in percentage points, always with its sign: -0.973 as "−97.3"."""
    return "–" if difference is None else _rounded(100 * difference, digits, signed=True)


def signed(value: float | None) -> str:
    """Returns the text of `number(value)`, with a plus sign if the value is above 0."""
    if value is None:
        return "–"
    text = number(value)
    return text if text.startswith("−") or value == 0 else f"+{text}"


def duration(seconds: float) -> str:
    """Returns a duration in words: 43.2 as "43 s", 357 as "5 min 57 s", 7380 as "2 h 3 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rounded(value: float, digits: int, *, signed: bool = False) -> str:
    """Returns a number with `digits` decimals, never "-0.0"; a thin space separates thousands."""
    if not math.isfinite(value):
        return "–"
    value = round(value, digits) + 0.0
    text = f"{value:+,.{digits}f}" if signed and value else f"{value:,.{digits}f}"
    return text.replace("-", "−").replace(",", "\u2009")
