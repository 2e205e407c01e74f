"""The markup of parts of a page."""

from icet_jax.report.page import environment


def html(blocks):
    """Blocks as the page has them."""
    return str(environment().get_template("blocks.html").module.blocks(blocks))
