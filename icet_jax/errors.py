"""The one exception a user is meant to see."""

import unicodedata

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def one_line(text: str) -> str:
    """`text` as one line of visible characters: line ends are spaces, what steers a terminal is written as an escape.

    Names and values that a file gave are quoted in errors and reports; none may break the line, colour or reorder it.
    """
    if text.isascii() and text.isprintable():
        return text
    text = " ".join(text.splitlines())
    return "".join(
        char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in _HIDDEN else char
        for char in text
    )


class UserError(Exception):
    """Bad input: one line that names the file, field or row, what was wrong, and the mend.

    The front door (`icet_jax.main`) prints the line alone and exits with code 2.
    """

    def __init__(self, line: str) -> None:
        """`line` may quote what a file holds: it is put through `one_line`."""
        super().__init__(one_line(line))
