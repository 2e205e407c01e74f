"""The one exception a user is meant to see."""


def one_line(text: str) -> str:
    """`text` as one line of visible characters: line ends are spaces, what steers a terminal is written as an escape.

    Names and values that a file gave are quoted in errors and reports; none may break the line, colour or reorder it.
    """
    if text.isprintable():
        return text
    shown = " ".join(text.splitlines())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in shown)


class UserError(Exception):
    """Bad input: one line that names the file, field or row, what was wrong, and the mend.

    The front door (`icet_jax.main`) prints the line alone and exits with code 2.
    """

    def __init__(self, line: str) -> None:
        """`line` may quote what a file holds: it is put through `one_line`."""
        super().__init__(one_line(line))
