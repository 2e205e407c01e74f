"""The markup of parts of a page."""

import base64
import gzip
import json
import re

from icet_jax.report.page import environment


def html(blocks):
    """Blocks as the page has them."""
    return str(environment().get_template("blocks.html").module.blocks(blocks))


def transcript_data(page):
    """The transcripts that a page unpacks; None for a page without any."""
    return _packed(page, "transcript-data")


def chart_data(page):
    """The data of a page's charts."""
    return _packed(page, "chart-data")


def _packed(page, element_id):
    packed = re.search(rf'<script type="text/plain" id="{element_id}">([^<]*)</script>', page)
    return None if packed is None else json.loads(gzip.decompress(base64.b64decode(packed[1])))


def unpacked(page):
    """All text that a page holds: its markup, and the transcripts and numbers that it unpacks."""
    return page + json.dumps([transcript_data(page), chart_data(page)], ensure_ascii=False)
