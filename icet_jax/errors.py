"""The one exception a user is meant to see."""


class UserError(Exception):
    """Bad input: one line that names the file, field or row, what was wrong, and the mend.

    The front door (`icet_jax.main`) prints the line alone and exits with code 2.
    """
